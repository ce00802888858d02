"""What the two passes of blocked attention are called with, sorted by what they may do with it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

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
    """score_mod with what it captured as arguments: (function, floating arrays, other arrays).

    Within a shard_map the function raises NotImplementedError for loops and branches in score_mod.
    """
    if score_mod is None:
        return None, [], []
    scalars = [jax.ShapeDtypeStruct((), x) for x in (jnp.float32, *[jnp.int32] * 4)]
    closed = jax.make_jaxpr(score_mod)(*scalars)
    learned = [jnp.issubdtype(x.dtype, jnp.floating) for x in closed.consts]

    def opened(captured, constants, *scalars):
        captured, constants = iter(captured), iter(constants)
        values = [next(captured if x else constants) for x in learned]
        evaluate = _evaluate if _varies((values, scalars)) else jax.core.eval_jaxpr
        return evaluate(closed.jaxpr, values, *scalars)[0]

    pick = lambda kind: [x for x, y in zip(closed.consts, learned, strict=True) if y == kind]
    return opened, pick(True), pick(False)


def _evaluate(jaxpr, consts, *args):
    """As jax.core.eval_jaxpr, for arrays that vary over more mesh axes than those of the trace.

    An operation within a shard_map needs arguments that vary alike: here they are cast.
    """
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda x: jnp.asarray(x.val, x.aval.dtype) if isinstance(x, Literal) else env[x]
    for eqn in jaxpr.eqns:
        values = [read(x) for x in eqn.invars]
        env.update(zip(eqn.outvars, apply(eqn, varying(values, like=values)), strict=True))
    return [read(x) for x in jaxpr.outvars]


def apply(eqn, values) -> list:
    """What an equation of a jaxpr gives for values that vary alike over mesh axes."""
    name, params = eqn.primitive.name, eqn.params
    if name == "pvary":
        cast = lambda x: lax.pcast(x, tuple(set(params["axes"]) - _varies(x)), to="varying")
        return [cast(x) for x in values]
    if name in ("jit", "pjit"):
        return _evaluate(params["jaxpr"].jaxpr, params["jaxpr"].consts, *values)
    is_jaxpr = lambda x: hasattr(x, "eqns")
    if any(map(is_jaxpr, jax.tree.leaves(params, is_leaf=is_jaxpr))):
        where = "on several devices or in a kernel, jnp.where can"
        raise NotImplementedError(f"score_mod can't call {name} {where}")
    out = eqn.primitive.bind(*values, **params)
    return out if eqn.primitive.multiple_results else [out]


def zeros(shape, like):
    """Zeros in float32 that vary over the mesh axes that `like` varies over."""
    return jnp.zeros_like(like, jnp.float32, shape)


def varying(x, like):
    """x, said to vary over each mesh axis that anything in `like` varies over.

    shard_map checks that what a loop carries has one type; gradients are summed where this casts.
    """
    axes = _varies(like)
    cast = lambda leaf: lax.pcast(leaf, tuple(axes - _varies(leaf)), to="varying")
    return jax.tree.map(cast, x)


def _varies(tree):
    """Mesh axes over which any array varies."""
    return frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(tree)))
