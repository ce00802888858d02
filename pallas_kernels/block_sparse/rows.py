"""Queries in tiles, each of which attends to the same blocks of keys, and what came of them back.

A unit is an example and a key head; its R queries are those of its G query heads, one head after
the other. Letters: U units, M tiles, X queries of a tile, A blocks of a query, L blocks.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.block_sparse.walk import Pairs

MOST_KEYS = 2**31  # of a sort, that an integer tells apart
_CHUNK = 256  # pairs that are compared with one another


class Tiles(NamedTuple):
    """Places for pairs of a query and a block that it selected, X to a tile of one block."""

    query: Int[Array, "*U M X"]  # R where there is none
    block: Int[Array, "*U M"]
    slot: Int[Array, "*U A R"]  # of each pair, in M * X
    count: Int[Array, "*U"]  # tiles that hold a pair


def lay(selected: Int[Array, "R A"], *, L: int, X: int) -> Tiles:
    """The tiles of one unit, in the order of their blocks.

    Made for TPU, where a sort of more than single numbers takes minutes to compile and a scatter
    goes one by one: places are counted, by comparisons that a compiler sums without storing them.
    More than MOST_KEYS pairs times blocks, which the form for TPU doesn't have, are sorted by both.
    """
    (R, A), selected = selected.shape, selected.T  # few numbers in the last axis take as many lanes
    blocks = selected.reshape(-1)
    chunks = jnp.pad(blocks, (0, -len(blocks) % _CHUNK), constant_values=L).reshape(-1, _CHUNK)
    of_block = chunks[..., None] == jnp.arange(L)[None, None]
    each = of_block.sum(1)  # pairs of each chunk and block
    count = each.sum(0)
    tiles = -(-count // X)
    end, tile = jnp.cumsum(tiles), jnp.arange(most_tiles(R * A, L, X))
    begin = jnp.cumsum(each, 0) - each + X * (end - tiles)[None]  # place of the first one
    same = chunks[:, :, None] == chunks[:, None, :]
    nth = (same & jnp.tri(_CHUNK, k=-1, dtype=bool)[None]).sum(-1)
    slot = nth + jnp.where(of_block, begin[:, None], 0).sum(-1)
    block = jnp.minimum(jnp.searchsorted(end, tile, side="right", method="compare_all"), L - 1)
    nth = X * (tile - (end - tiles)[block])  # of the block's pairs, that the tile begins with
    query = _by_block(selected, (jnp.cumsum(count) - count)[block] + nth, X, L)
    exists = nth[:, None] + jnp.arange(X)[None] < count[block][:, None]
    slot = slot.reshape(-1)[: R * A].reshape(A, R)
    return Tiles(jnp.where(exists, query, R), block, slot, end[-1])


def _by_block(selected, at, size, L):
    """From each place `at`, the next `size` queries in the order of the blocks they selected."""
    pairs = selected.reshape(-1)
    if L * len(pairs) <= MOST_KEYS:
        order = jax.lax.sort(pairs * len(pairs) + jnp.arange(len(pairs)), is_stable=False)
    else:
        order = jnp.argsort(pairs, stable=True)
    order = jnp.pad(order % selected.shape[1], (0, size))
    return jax.vmap(lambda i: jax.lax.dynamic_slice(order, (i,), (size,)))(at)


def most_tiles(pairs: int, L: int, X: int) -> int:
    """M: as many as any selection of so many pairs needs."""
    return min(pairs, (pairs + L * (X - 1)) // X)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gathered:
    """Each query lies in as many tiles as it selected blocks, and has a piece of output in each."""

    tiles: Tiles

    @property
    def pairs(self) -> Pairs:
        """Of a tile and its block; tiles are in the order of blocks already."""
        block = self.tiles.block
        by_block = jnp.broadcast_to(jnp.arange(block.shape[1])[None], block.shape)
        return Pairs(block[..., None], self.tiles.count, by_block)

    def output(self, dtype):
        """The dtype of pieces of an output of this dtype."""
        return jnp.float32

    def take(self, x: Shaped[Array, "U R *F"], fill=0) -> Shaped[Array, "U M X *F"]:
        """x by tile, with `fill` where there is no query."""
        get = lambda x, query: x.at[query].get(mode="fill", fill_value=fill)
        return jax.vmap(get)(x, self.tiles.query)

    def merge(self, o: Float[Array, "U M X V"], lse: Float[Array, "U M X"]):
        """(o (U R V), lse (U R)) of all pieces of each query."""
        o, lse = self._pieces(o), self._pieces(lse)
        total = jax.nn.logsumexp(lse, 1)
        share = jnp.where(lse > -jnp.inf, jnp.exp(lse - total[:, None]), 0.0)
        return jnp.einsum("UAR,UARV->URV", share, o), total

    def sum(self, x: Float[Array, "U M X F"]) -> Float[Array, "U R F"]:
        """The sum of the pieces of each query."""
        return self._pieces(x).sum(1)

    def _pieces(self, x):
        """(U M X ...) -> (U A R ...)."""
        flat = x.reshape(x.shape[0], -1, *x.shape[3:])
        return jax.vmap(lambda x, slot: x[slot])(flat, self.tiles.slot)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cut:
    """Queries that follow one another share their blocks: each lies in one tile, as it comes."""

    blocks: Int[Array, "U M A"]  # that each tile attends to
    heads: int = dataclasses.field(metadata=dict(static=True))  # G
    length: int = dataclasses.field(metadata=dict(static=True))  # queries of a head
    size: int = dataclasses.field(metadata=dict(static=True))  # X

    @property
    def pairs(self) -> Pairs:
        """Of each tile and each of its blocks."""
        U, M, A = self.blocks.shape
        order = self.blocks.reshape(U, -1) * (M * A) + jnp.arange(M * A)[None]
        order = jax.lax.sort(order, is_stable=False) % (M * A)
        return Pairs(self.blocks, jnp.full_like(self.blocks[:, 0, 0], M), order)

    def output(self, dtype):
        """The dtype of an output: there is one piece."""
        return dtype

    def take(self, x: Shaped[Array, "U R *F"], fill=0) -> Shaped[Array, "U M X *F"]:
        """x by tile, with `fill` where there is no query."""
        x = x.reshape(x.shape[0], self.heads, self.length, *x.shape[2:])
        widths = [(0, -self.length % self.size if axis == 2 else 0) for axis in range(x.ndim)]
        x = jnp.pad(x, widths, constant_values=fill)
        return x.reshape(x.shape[0], -1, self.size, *x.shape[3:])

    def merge(self, o: Float[Array, "U M X V"], lse: Float[Array, "U M X"]):
        """(o (U R V), lse (U R)) without what fills up the last tile of a head."""
        return self.sum(o), self.sum(lse)

    def sum(self, x: Float[Array, "U M X *F"]) -> Float[Array, "U R *F"]:
        """The one piece of each query."""
        x = x.reshape(x.shape[0], self.heads, -1, *x.shape[3:])[:, :, : self.length]
        return x.reshape(x.shape[0], -1, *x.shape[3:])
