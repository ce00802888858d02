"""Softmax attention in which every query and head has blocks of keys of its own.

Pairs of a query and a block that it selected are sorted by block and laid into tiles, each of one
block; tiles are attended to in turn, and the pieces of a query are merged by their lse. Whatever
the selection, A blocks a query make no more than A T / X + S / C tiles of X = min(T, C) queries.
So the work is that of (A + 1) blocks a query and memory is linear in T and S.

Source: Lu et al., "MoBA", arXiv:2502.13189, algorithm 1. Unlike there: shapes don't depend on the
selection, and the block that a query lies in is one of those that it selects.

Letters: A blocks selected by a query, C keys of a block, L blocks, M tiles, X queries of a tile.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops


def selected_block_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    selected: Int[Array, "B T N A"],
    *,
    block: int,
    mask: masks.Mask | None = None,
    q_offset: int | Int[Array, ""] = 0,
) -> Float[Array, "B T N V"]:
    """Attention of each query to the keys of its blocks, with scale 1/sqrt(H).

    Args:
      selected: numbers of blocks, no two of a query the same; block i holds the keys i * block to
        (i + 1) * block - 1. Has no gradient.
      mask: what a query may see beside; honours Causal, Window, Prefix, Segments and Valid, and is
        a NotImplementedError for others.
      q_offset: position of the first query; keys begin at 0.

    A query that sees nothing gives zeros. Returns v's dtype.
    """
    _check(mask)
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    mask = masks.Prefix(S) if mask is None else mask & masks.Prefix(S)  # the last block is padded
    leaves, tree = jax.tree.flatten(mask)  # each is (B or 1, length)
    leaves = [jnp.broadcast_to(x, (B, *x.shape[1:])) for x in leaves]
    q, selected = (x.reshape(B, T, K, N // K, -1).transpose(0, 2, 3, 1, 4) for x in (q, selected))
    k, v = (cut(x, block).transpose(0, 3, 1, 2, 4) for x in (k, v))
    attend = functools.partial(_attend, q_offset + jnp.arange(T), tree)
    for axes in ((0, None, None, 0, None), (0, 0, 0, 0, None), 0):  # over G, K and B
        attend = jax.vmap(attend, axes)
    return attend(q, k, v, selected, leaves).transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)


def cut(x: Shaped[Array, "B S *X"], block: int) -> Shaped[Array, "B L C *X"]:
    """The blocks of x, the last one filled up by zeros."""
    B, S, *rest = x.shape
    x = jnp.pad(x, ((0, 0), (0, -S % block), *[(0, 0)] * len(rest)))
    return x.reshape(B, -1, block, *rest)


def _check(mask):
    kinds = masks.Causal, masks.Window, masks.Prefix, masks.Segments, masks.Valid
    masks.select(mask, *kinds, by="selected_block_attention")


def _attend(t, tree, q, k, v, selected, leaves):
    """One head: t (T), q (T H), k (L C H), v (L C V), selected (T A) -> (T V)."""
    L, C, V = v.shape
    mask = tree.unflatten([x[None] for x in leaves])
    tiles = _lay(selected, L, min(len(t), C))

    @jax.checkpoint  # scores of a tile are computed again in the backward pass
    def tile(x):
        t, q, k, v, block = x
        q, k, v = (x[None, :, None] for x in (q, k, v.astype(jnp.float32)))
        at = t, block * C + jnp.arange(C)
        o, lse = ops.dot_product_attention(q, k, v, mask=mask, positions=at, return_lse=True)
        return o[0, :, 0], lse[0, :, 0]

    x = t[tiles.query], q[tiles.query], k[tiles.block], v[tiles.block], tiles.block
    o, lse = (x.reshape(-1, *x.shape[2:])[tiles.slot] for x in jax.lax.map(tile, x))
    share = jax.nn.softmax(jnp.maximum(lse, -1e30), -1)  # -inf, where nothing is seen, gives NaN
    return jnp.einsum("TA,TAV->TV", share, o).astype(v.dtype)


class _Tiles(NamedTuple):
    """Slots for pairs of a query and a block. Some slots stay empty and hold query 0."""

    query: Int[Array, "M X"]
    block: Int[Array, "M"]
    slot: Int[Array, "T A"]  # of each pair, in M * X


def _lay(selected, L, X):
    T, A = selected.shape
    blocks = selected.reshape(-1)
    M = min(T * A, (T * A + L * (X - 1)) // X)  # the most that any selection needs
    count = jnp.bincount(blocks, length=L)
    gaps = -count % X  # each block begins a new tile
    order = jnp.argsort(blocks)
    shift = (jnp.cumsum(gaps) - gaps)[blocks[order]]
    slot = jnp.zeros_like(order).at[order].set(jnp.arange(T * A) + shift)
    query = jnp.zeros_like(order, shape=M * X).at[slot].set(jnp.arange(T * A) // A)
    of_tile = jnp.searchsorted(jnp.cumsum(count + gaps), X * jnp.arange(M), side="right")
    return _Tiles(query.reshape(M, X), jnp.minimum(of_tile, L - 1), slot.reshape(T, A))
