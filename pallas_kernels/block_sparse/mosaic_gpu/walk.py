"""How a block of threads walks where a tile of queries has one block of keys.

Tiles of queries are in the order of their blocks. So all keys that a tile of queries meets follow
one another, and so do all tiles of queries that meet a tile of keys: a list is two numbers, and
lists take memory in proportion to tiles, not to pairs of them.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse.tile import Options
from pallas_kernels.block_sparse.walk import Pairs
from pallas_kernels.flash_attention.mosaic_gpu import walk
from pallas_kernels.flash_attention.walk import FULL, PARTIAL


@dataclasses.dataclass(frozen=True)
class Runs(walk.Walk):
    """Lists of steps that follow one another, all of one kind.

    tables are the first step of each list, and how many there are (U 1 lists).
    """

    average: int  # tiles of a list, if every query selects as many blocks as it may

    @property
    def most(self) -> int:
        """Tiles of a list, for the cost."""
        return self.average

    def each(self, tables, at: tuple, visit: Callable, carry):
        """`carry = visit(carry, begin, partial)` for the steps of the list at (unit, 0, list)."""
        first, count = (x[*at] for x in tables)
        begin = lambda i: lambda: (first + i) * self.step
        body = lambda i, carry: visit(carry, begin(i), PARTIAL in self.kinds)
        return lax.fori_loop(0, count, body, carry)


def runs(options: Options, pairs: Pairs, *, masked: bool, over: str, tile: int, step: int) -> Runs:
    """A walk along each "row", a tile of queries, or "column", a tile of keys."""
    M, S, block = pairs.blocks.shape[1], options.S, options.block
    blocks, exists = pairs.blocks[..., 0], jnp.arange(M)[None] < pairs.count[:, None]
    tiles, parts = -(-S // tile), -(-block // tile)
    if over == "row":
        ends = blocks * block // step, -(-jnp.minimum((blocks + 1) * block, S) // step)
        first, end = (jnp.where(exists, x, 0) for x in ends)
    else:
        begin, blocks = jnp.arange(tiles) * tile, jnp.where(exists, blocks, S)  # more than any
        last = jnp.minimum(begin + tile, S) - 1
        first = _search(blocks, begin // block, "left") * (tile // step)
        end = _search(blocks, last // block, "right") * (tile // step)
    tables = tuple(x[:, None].astype(jnp.int32) for x in (first, end - first))
    average = parts if over == "row" else -(-M * parts // tiles)
    return Runs(tables, (PARTIAL if masked else FULL,), tile, step, average)


def _search(blocks, of, side):
    """Where blocks of rising numbers (U M) would have others (L) on their `side`: (U L)."""
    return jax.vmap(lambda x: jnp.searchsorted(x, of, side=side))(blocks)
