"""Softmax attention in which every query and head has blocks of keys of its own.

Pairs of a query and a block that it selected are sorted by block and laid into tiles, each of one
block; tiles are attended to in turn, and the pieces of a query are merged by their lse. Whatever
is selected, the pairs need no more than A T / X + L tiles of X = min(T, C) queries, so the work is
that of A + 1 blocks a query, and memory is linear in T and S. A single query reads A blocks. The
table of a device (`pallas_kernels.tables`) may have another X, as `block_q` of "xla".

Source: Lu et al., "MoBA", arXiv:2502.13189, section 2.3. Unlike there: shapes don't depend on the
selection, and the block that a query lies in is treated as any other.

On TPU and on Hopper GPUs a kernel does the same (`pallas_kernels.block_sparse`), and where queries
that follow one another share a selection, they are a tile of it as they come: on a GPU if the runs
and the blocks are whole tiles of softmax attention, whose kernel takes them then.

Letters: A blocks selected by a query, C keys of a block, L blocks, M tiles, X queries of a tile,
I runs of queries that share a selection.
"""

import functools
import math
from typing import get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnjax.core import masks
from attnjax.ops import blocked_arguments, flash_attention, flash_mask, selected_block_loop
from attnjax.ops.selected_block_loop import cut  # noqa: F401
from pallas_kernels import block_sparse as kernels
from pallas_kernels import flash_attention as dense_kernels
from pallas_kernels import placing, tables
from pallas_kernels.block_sparse import mosaic_gpu as block_sparse_gpu
from pallas_kernels.flash_attention import mosaic_gpu

Implementation = kernels.Implementation

_KINDS = masks.Causal, masks.Window, masks.Prefix, masks.Segments, masks.Valid


def selected_block_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    selected: Int[Array, "B I N A"],
    *,
    block: int,
    query_block: int = 1,
    mask: masks.Mask | None = None,
    q_offset: int | Int[Array, ""] = 0,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """Attention of each query to the keys of its blocks, with scale 1/sqrt(H).

    Args:
      selected: numbers of blocks, no two of a query the same; block i holds the keys i * block to
        (i + 1) * block - 1. Has no gradient.
      query_block: queries that share what they select, I = ceil(T / query_block).
      mask: what a query may see beside; honours Causal, Window, Prefix, Segments and Valid, and is
        a NotImplementedError for others.
      q_offset: position of the first query; keys begin at 0.
      implementation: "xla" (which alone has forward-mode derivatives), "pallas" (TPU and Hopper
        GPUs), or "interpret", which runs the one for TPU on any platform, slowly. None is what the
        table of the device says, or without a row the kernel where the call is lowered for TPU;
        if it runs whole on each device (`pallas_kernels.placing`) and, on TPU, scalar memory has
        room for the pairs of a tile and a block. XLA elsewhere.

    A query that sees nothing gives zeros. Returns v's dtype. Raises ValueError for arguments and
    rows of the table that don't fit, NotImplementedError for what the kernel that is asked for
    can't honour: on TPU more pairs than it has room for, on GPU what
    `pallas_kernels.flash_attention.mosaic_gpu` refuses.
    """
    masks.select(mask, *_KINDS, by="selected_block_attention")
    _check(q, selected, query_block, implementation)
    sizes = dict(block=min(block, k.shape[1]), query_block=query_block)
    forms = _by_xla, _by_kernel, _by_gpu
    by_xla, by_kernel, by_gpu = (functools.partial(x, mask=mask, **sizes) for x in forms)
    args = q, k, v, selected, q_offset + jnp.arange(q.shape[1])
    fits = kernels.plan_of(*args[:4], **sizes).fits
    row = tables.here().find(kernels.NAME, **tables.case_between(q, k, v))
    options = dict(xla=by_xla, tpu=by_kernel, gpu=by_gpu, fits=fits, row=row)
    return placing.run(args, implementation, **options)


def _check(q, selected, query_block, implementation):
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(f"{implementation=} must be one of {get_args(Implementation)}")
    if query_block < 1:
        raise ValueError(f"{query_block=} must be at least 1")
    runs = -(-q.shape[1] // query_block)
    if selected.shape[1] != runs:
        raise ValueError(f"selected {selected.shape} must be of {runs} runs of {query_block=}")


def _by_kernel(
    q, k, v, selected, t, *, mask, attend=kernels.block_sparse_attention, interpret=False, **sizes
):
    dtype = jnp.result_type(q, k)
    visible, arrays = flash_mask.translate(mask, t, jnp.arange(k.shape[1]), (1, 1))
    args = q.astype(dtype), k.astype(dtype), v, selected, t, kernels.Mask(None, arrays)
    # gradients of arrays that are whole in some axes of a mesh are summed where this casts
    *args, mask = blocked_arguments.varying(args, like=args)
    mask = mask._replace(visible=visible)
    return attend(*args, mask, interpret=interpret, **sizes)


def _by_gpu(q, k, v, selected, t, *, mask, block, query_block, interpret=False):
    _sizes(q, k, v, {}, kernel_for="cuda")  # none is free
    (B, T, N, _), S, tile = q.shape, k.shape[1], mosaic_gpu.TILE
    tiles = -(-T // tile), -(-S // tile)
    if query_block % tile or block % tile or math.prod((B, N, *tiles)) > mosaic_gpu.MOST_STATES:
        attend = block_sparse_gpu.block_sparse_attention
        options = dict(mask=mask, attend=attend, interpret=interpret)
        return _by_kernel(q, k, v, selected, t, block=block, query_block=query_block, **options)
    row, column = (
        jnp.arange(n) * tile // size for n, size in zip(tiles, (query_block, block), strict=True)
    )
    chosen = (selected[:, row, :, :, None] == column[None, None, None, None]).any(3)
    return _by_tiles(q, k, v, chosen.swapaxes(1, 2), t, mask=mask, interpret=interpret)


def _by_tiles(q, k, v, chosen, t, *, mask, interpret):
    """By the kernel of softmax attention, of which the `chosen` tiles (B N tq tk) are visited."""
    s, dtype, tile = jnp.arange(k.shape[1]), jnp.result_type(q, k), (mosaic_gpu.TILE,) * 2
    states = jnp.where(chosen, flash_attention.states_of(mask, t, s, tile), masks.EMPTY)
    visible, arrays = flash_mask.translate(mask, t, s, tile)
    args = q.astype(dtype), k.astype(dtype), v, t, s, dense_kernels.Mask(states, None, arrays)
    *args, asked = blocked_arguments.varying(args, like=args)
    asked = asked._replace(visible=visible)
    scale = q.shape[-1] ** -0.5
    return mosaic_gpu.flash_attention(*args, asked, scale=scale, interpret=interpret)[0]


def _by_xla(q, k, v, selected, t, *, mask, block, query_block):
    selected = jnp.repeat(selected, query_block, 1)[:, : len(t)]
    sizes = dict(block=block) | _sizes(q, k, v, dict(block_q=block), kernel_for=None)
    return selected_block_loop.selected_block_loop(q, k, v, selected, t, mask=mask, **sizes)


def _sizes(q, k, v, rules, *, kernel_for):
    case = tables.case_between(q, k, v)
    return tables.here().tiles(kernels.NAME, rules, kernel_for=kernel_for, **case)
