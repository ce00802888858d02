r"""Softmax attention of many small groups of queries, each with the few keys that it needs.

    x_ts = scale (q_t . k_s) + bias_ts        where t sees s, else -inf
    o_t  = sum_s softmax(x_t)_s v_s

Windows of an image, neighborhoods of a grid: a group has tens or hundreds of queries and keys, the
scores of one fit into fast memory and never leave it, and there are thousands of groups. What a
query sees is said by intervals (`Near`), and the bias is the same for all groups.

`layout` packs groups side by side, `tile` is the maths of one pack and `mosaic_tpu` walks over
them; `mosaic_gpu` is the form for Hopper. Backward makes the weights again from queries and keys,
so that nothing else is kept.

The table of a device (`pallas_kernels.tables`) says how many groups a `pack` has at most, and on a
TPU how many `packs` a step has; as far as a register's lanes, or a tile of queries on a GPU, and
fast memory have room.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import tables
from pallas_kernels.neighborhood import layout, mosaic_tpu

NAME = "neighborhood_attention"  # in tables of devices


class Near(NamedTuple):
    """Query t of group g sees key s where low <= at <= high on every axis a of a grid."""

    at: Int[Array, "A #G S"]  # of keys; the same for all groups where their axis has size 1
    low: Int[Array, "A G T"]
    high: Int[Array, "A G T"]


def fits(
    q: jax.Array, k: jax.Array, v: jax.Array, near: Near | None, bias: jax.Array | None
) -> bool:
    """Whether the scores of a group, and all that belongs to it, fit into fast memory."""
    return _cut(q, k, v, near, bias).vmem <= layout.VMEM


def tiles(q: jax.Array, v: jax.Array, *names: str, kernel_for: str | None) -> dict:
    """The sizes of these names in the table of the device, as `Table.tiles`; None is by rule."""
    rules = dict.fromkeys(names)
    return tables.here().tiles(NAME, rules, kernel_for=kernel_for, **case_of(q, v))


def case_of(q: jax.Array, v: jax.Array) -> dict:
    """What `Table.find` asks: length is that of the queries of all groups of a sequence."""
    _, G, T, _, H = q.shape
    return dict(dtype=q.dtype, head_dim=max(H, v.shape[-1]), length=G * T)


def neighborhood_attention(
    q: Float[Array, "B G T N H"],
    k: Float[Array, "B G S K H"],
    v: Float[Array, "B G S K V"],
    *,
    scale: float,
    near: Near | None = None,
    bias: Float[Array, "N T S"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B G T N V"]:
    """The output in v's dtype, by a kernel for TPU; no forward-mode derivative.

    Args:
      near: what queries see; None is every key of the group. A query that sees nothing gives zeros.
      bias: of the scores of each group; it has a gradient, as q, k and v have.
      interpret: run the kernel on any platform, slowly.

    Raises NotImplementedError for groups that don't fit (`fits`), and ValueError for a row of the
    table of the device with other tiles than `pack` and `packs`.
    """
    cut = _cut(q, k, v, near, bias)
    if cut.vmem > layout.VMEM:
        raise NotImplementedError(
            f"groups of {q.shape[2]} queries and {k.shape[2]} keys are too large for the kernel; "
            "smaller windows, or implementation='xla', can be had"
        )
    B, G = q.shape[:2]
    if near is None:
        q, k, v = map(_as_groups, (q, k, v))
    # varying over the axes of a mesh that q varies over, as all arrays of a kernel must
    near, bias = jax.tree.map(lambda x: x + jnp.zeros_like(q, x.dtype, x.shape), (near, bias))
    o = _op((q, k, v, bias), near, cut, scale, interpret)
    return o.reshape(B, G, *o.shape[2:])


def _as_groups(x):
    """Sequences are but more groups, where nothing is said of each."""
    return x.reshape(1, -1, *x.shape[2:])


def _cut(q, k, v, near, bias):
    """The sizes, by the rules where memory has no room for those of the table."""
    asked = tiles(q, v, "pack", "packs", kernel_for="tpu")
    if near is None:
        q, k, v = (jax.eval_shape(_as_groups, x) for x in (q, k, v))
    of = functools.partial(layout.Cut.of, q, k, v, biased=bias is not None)
    cut = of(**asked)
    return cut if cut.vmem <= layout.VMEM else of()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _op(arrays, near, cut, scale, interpret):
    return mosaic_tpu.forward(cut, arrays, near, scale=scale, interpret=interpret)


def _forward(arrays, near, cut, scale, interpret):
    return _op(arrays, near, cut, scale, interpret), (arrays, near)


def _backward(cut, scale, interpret, residuals, do):
    return mosaic_tpu.backward(cut, *residuals, do, scale=scale, interpret=interpret), None


_op.defvjp(_forward, _backward)
