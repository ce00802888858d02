"""Softmax attention in which every query and head has blocks of keys of its own.

Pairs of a query and a block that it selected are sorted by block and laid into tiles, each of one
block; tiles are attended to in turn, and the pieces of a query are merged by their lse. Whatever
is selected, the pairs need no more than A T / X + L tiles of X = min(T, C) queries, so the work is
that of A + 1 blocks a query, and memory is linear in T and S. A single query reads A blocks.

Source: Lu et al., "MoBA", arXiv:2502.13189, section 2.3. Unlike there: shapes don't depend on the
selection, and the block that a query lies in is treated as any other.

Letters: A blocks selected by a query, C keys of a block, L blocks, M tiles, X queries of a tile.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops

_KINDS = masks.Causal, masks.Window, masks.Prefix, masks.Segments, masks.Valid


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
    masks.select(mask, *_KINDS, by="selected_block_attention")
    exists = masks.Prefix(k.shape[1])  # the last block is padded
    mask = exists if mask is None else mask & exists
    k, v = cut(k, block), cut(v, block)
    lay = functools.partial(_lay, L=k.shape[1], X=min(q.shape[1], block))
    tiles = jax.vmap(jax.vmap(lay, 1))(selected)
    o, lse = _attend(q, k, v, tiles, mask, q_offset + jnp.arange(q.shape[1]))
    share = jax.nn.softmax(jnp.maximum(lse, -1e30), -1)  # -inf, where nothing is seen, gives NaN
    return jnp.einsum("BNTA,BNTAV->BTNV", share, o).astype(v.dtype)


def cut(x: Shaped[Array, "B S *X"], block: int) -> Shaped[Array, "B L C *X"]:
    """The blocks of x, the last one filled up by zeros."""
    B, S, *rest = x.shape
    x = jnp.pad(x, ((0, 0), (0, -S % block), *[(0, 0)] * len(rest)))
    return x.reshape(B, -1, block, *rest)


class _Tiles(NamedTuple):
    """Slots for pairs of a query and a block. Slots that no pair fills hold query 0."""

    query: Int[Array, "*B M X"]
    block: Int[Array, "*B M"]
    slot: Int[Array, "*B T A"]  # of each pair, in M * X


def _lay(selected, *, L, X):
    """The tiles of one head, of selected blocks (T A)."""
    T, A = selected.shape
    blocks, pairs = selected.reshape(-1), jnp.arange(T * A)
    M = min(T * A, (T * A + L * (X - 1)) // X)  # the most that any selection needs
    count = jnp.bincount(blocks, length=L)
    gaps = -count % X  # each block begins a new tile
    order = jnp.argsort(blocks)
    shift = (jnp.cumsum(gaps) - gaps)[blocks[order]]
    slot = jnp.zeros_like(pairs).at[order].set(pairs + shift)
    query = jnp.zeros_like(pairs, shape=M * X).at[slot].set(pairs // A)
    block = jnp.searchsorted(jnp.cumsum(count + gaps), X * jnp.arange(M), side="right")
    return _Tiles(query.reshape(M, X), jnp.minimum(block, L - 1), slot.reshape(T, A))


def _attend(q, k, v, tiles, mask, t):
    """Each query's pieces (B N T A V) and their lse (B N T A), k and v being cut into blocks."""
    (B, _, N, _), C = q.shape, k.shape[2]
    b, n = jnp.arange(B)[:, None, None], jnp.arange(N)[None, :, None]
    keys = b, tiles.block, slice(None), n // (N // k.shape[3])
    b, n = b[..., None], n[..., None]
    leaves, tree = jax.tree.flatten(mask)  # each (B or 1, length)
    leaves = [jnp.broadcast_to(x, (B, *x.shape[1:])) for x in leaves]

    def head(t, q, k, v, block, leaves):
        mask = tree.unflatten([x[None] for x in leaves])
        q, k, v = (x[None, :, None] for x in (q, k, v.astype(jnp.float32)))
        at = t, block * C + jnp.arange(C)
        o, lse = ops.dot_product_attention(q, k, v, mask=mask, positions=at, return_lse=True)
        return o[0, :, 0], lse[0, :, 0]

    heads = jax.vmap(jax.vmap(head, (0, 0, 0, 0, 0, None)))
    tile = jax.checkpoint(lambda x: heads(*x, leaves))  # scores are computed again, not kept
    x = t[tiles.query], q[b, tiles.query, n], k[keys], v[keys], tiles.block
    pieces = jax.lax.map(tile, [jnp.moveaxis(x, 2, 0) for x in x])
    pieces = (jnp.moveaxis(x, 0, 2).reshape(B, N, -1, *x.shape[4:]) for x in pieces)
    return [x[b, n, tiles.slot] for x in pieces]
