"""What the two passes of blocked attention are called with, sorted by what they may do with it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.core.masks import Mask
from attnjax.ops.blocked_schedule import Schedule
from attnjax.ops.dropout import Dropout


class Options(NamedTuple):
    """What is known while tracing."""

    q_scale: float  # of queries; with `scale`, from products to scores in units of log 2
    scale: float  # of scores
    softcap: float | None
    score_mod: Callable | None  # takes captured and constants before its five scalars


class Learned(NamedTuple):
    """What has gradients."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    sinks: jax.Array | None
    captured: list  # by score_mod: the floating-point arrays


class Given(NamedTuple):
    """What has none."""

    t: jax.Array  # (tq block) positions of queries
    s: jax.Array  # (tk block) positions of keys
    exists: np.ndarray  # (tk block) False for padding
    mask: Mask | None
    dropout: Dropout | None
    constants: list  # captured by score_mod: the other arrays
    schedule: Schedule


def open_closure(score_mod):
    """score_mod with what it captured as arguments: (function, floating arrays, other arrays)."""
    if score_mod is None:
        return None, [], []
    scalars = [jax.ShapeDtypeStruct((), x) for x in (jnp.float32, *[jnp.int32] * 4)]
    closed = jax.make_jaxpr(score_mod)(*scalars)
    learned = [jnp.issubdtype(x.dtype, jnp.floating) for x in closed.consts]

    def opened(captured, constants, *scalars):
        captured, constants = iter(captured), iter(constants)
        values = [next(captured if x else constants) for x in learned]
        return jax.core.eval_jaxpr(closed.jaxpr, values, *scalars)[0]

    pick = lambda kind: [x for x, y in zip(closed.consts, learned, strict=True) if y == kind]
    return opened, pick(True), pick(False)


def zeros(shape, like):
    """Zeros in float32 that vary over the mesh axes that `like` varies over."""
    return jnp.zeros_like(like, jnp.float32, shape)


def varying(x, like):
    """x, said to vary over each mesh axis that anything in `like` varies over.

    shard_map checks that what a loop carries has one type; gradients are summed where this casts.
    """
    varies = lambda leaf: jax.typeof(leaf).mat.varying
    axes = frozenset().union(*map(varies, jax.tree.leaves(like)))
    cast = lambda leaf: lax.pcast(leaf, tuple(axes - varies(leaf)), to="varying")
    return jax.tree.map(cast, x)
