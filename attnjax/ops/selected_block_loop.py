"""Attention to the blocks that each query selected, as a loop over tiles of queries of one block.

The form of `ops.selected_block_attention` that XLA compiles for any platform.

Letters: A blocks selected by a query, C keys of a block, L blocks, M tiles, X queries of a tile.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops


def selected_block_loop(q, k, v, selected, t, *, mask, block, block_q):
    """Of queries at positions t (T), each of which selects for itself: selected is (B T N A).

    A tile has block_q queries, if there are so many.
    """
    exists = masks.Prefix(k.shape[1])  # the last block is padded
    mask = exists if mask is None else mask & exists
    k, v = cut(k, block), cut(v, block)
    lay = functools.partial(_lay, L=k.shape[1], X=min(q.shape[1], block_q))
    tiles = jax.vmap(jax.vmap(lay, 1))(selected)
    o, lse = _attend(q, k, v, tiles, mask, t)
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
