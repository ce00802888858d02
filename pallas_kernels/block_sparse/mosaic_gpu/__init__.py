"""Exact softmax attention to chosen blocks of keys on Hopper GPUs, in time of what is chosen.

Queries are lined up by block into tiles of TILE, and a query that selects A blocks lies in A tiles,
as in the form for TPU. The kernels are those of flash attention, with walks of their own: `walk`
says which keys a tile of queries meets, and which tiles of queries a tile of keys; `kernels` calls.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import block_sparse
from pallas_kernels.block_sparse import vjp
from pallas_kernels.block_sparse.mosaic_gpu import kernels
from pallas_kernels.block_sparse.tile import Options
from pallas_kernels.flash_attention import mosaic_gpu

_MOST_UNITS = 2**16 - 1  # of a grid's last axis


def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    selected: Int[Array, "B I N A"],
    t: Int[Array, "T"],
    mask: block_sparse.Mask,
    *,
    block: int,
    query_block: int = 1,
    interpret=False,
) -> Float[Array, "B T N V"]:
    """o in v's dtype; arguments and gradients are those of `block_sparse.block_sparse_attention`.

    Time is that of tiles of TILE queries that selected a block, each with all keys of the block and
    what whole tiles have beside them: blocks of fewer than TILE keys cost up to as much as TILE.
    Memory is that of A copies of the queries, also where they share what they selected. No size
    is free: TILE is what two warpgroups multiply, and keys of a step in the forward kernel are
    those of softmax attention, by its rows in the table of the device.

    Args:
      interpret: `plgpu.InterpretGPUParams()` runs on a CPU, slowly.

    Raises NotImplementedError for more examples times key heads than a grid can have, and for the
    dtypes, heads and devices that `flash_attention.mosaic_gpu` refuses.
    """
    _check(q, k, v, interpret)
    selected = jnp.repeat(selected, query_block, 1)[:, : q.shape[1]]
    visible, by_query, by_key = mask.by_token(t)
    options = Options(q.shape[-1] ** -0.5, visible, k.shape[1], block, parts=1)
    static = vjp.Static(kernels, options, 1, mosaic_gpu.TILE, interpret)
    return vjp.attend(static, vjp.Learned(q, k, v), vjp.Given(selected, by_query, by_key))


def _check(q, k, v, interpret):
    mosaic_gpu.check(q, k, v, interpret)
    if (units := k.shape[0] * k.shape[2]) > _MOST_UNITS:
        raise NotImplementedError(
            f"the kernel for Hopper takes {_MOST_UNITS} examples times key heads, not {units}"
        )
