"""How a grid walks over the pairs of a tile of queries and a block of keys, and over no others.

A grid is (units, key tiles, steps). The pairs of one accumulator follow one another, so each sum
is made in a fixed order. What the steps are stands in tables that the kernel has before its blocks
are fetched. A unit with fewer steps than another stays at its last one: nothing is copied there,
and `Place.live` is False.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

MOST_PAIRS = 2**16  # of one call: two tables of them take half of a TPU's scalar memory

Over = Literal["queries", "keys"]  # what one accumulator belongs to: a tile of these


class Pairs(NamedTuple):
    """Pairs of a tile of queries and a block of keys.

    Args:
      blocks: that each tile attends to. From the first `count` tiles on there are none, but they
        have blocks that are not lower than the last ones.
      by_block: numbers of the pairs, m * A + a, in the order of their blocks.
    """

    blocks: Int[Array, "U M A"]
    count: Int[Array, "U"]
    by_block: Int[Array, "U P"]


class Place(NamedTuple):
    """Where a step of the grid is; scalars."""

    unit: Any
    tile: Any  # of queries
    block: Any  # of keys
    part: Any  # which tile of the block's keys
    first: Any  # whether the accumulator begins here
    last: Any  # whether it is complete after this
    live: Any  # whether there is such a step


@dataclasses.dataclass(frozen=True)
class Walk:
    """A grid with its tables; `at` reads them where they lie, in scalar memory."""

    over: Over
    grid: tuple[int, int, jax.Array]
    tables: tuple[jax.Array, ...]  # tiles of each unit; block of each pair; pairs by block
    most: int  # pairs that a unit may have
    blocks: int  # A, of a tile of queries
    parts: int  # tiles that a block of keys is cut into

    def at(self, ids, tables) -> Place:
        """The place of grid indices."""
        (unit, part, step), count = ids, tables[0]
        pairs = count[unit] * self.blocks
        steps = pairs * self.parts if self.over == "queries" else pairs
        at = jnp.minimum(step, steps - 1)
        place = self._by_query if self.over == "queries" else self._by_key
        return place(unit, part, at, pairs, *tables[1:])._replace(live=step < steps)

    def _by_query(self, unit, part, at, pairs, block):
        pair, part = _divided(at, self.parts)
        tile, nth = _divided(pair, self.blocks)
        first = (nth == 0) & (part == 0)
        last = (nth == self.blocks - 1) & (part == self.parts - 1)
        return Place(unit, tile, block[unit * self.most + pair], part, first, last, None)

    def _by_key(self, unit, part, at, pairs, block, by_block):
        pair = lambda i: by_block[unit * self.most + i]
        of = lambda i: block[unit * self.most + pair(i)]
        here, before, after = of(at), of(jnp.maximum(at - 1, 0)), of(jnp.minimum(at + 1, pairs - 1))
        tile, _ = _divided(pair(at), self.blocks)
        first, last = (at == 0) | (before != here), (at == pairs - 1) | (after != here)
        return Place(unit, tile, here, part, first, last, None)


def walk(pairs: Pairs, *, parts: int, over: Over) -> Walk:
    """A walk over the pairs, with the keys of a block in `parts` tiles."""
    U, M, A = pairs.blocks.shape
    steps, tables = pairs.count.max() * A, [pairs.count, pairs.blocks.reshape(-1)]
    if over == "keys":
        tables.append(pairs.by_block.reshape(-1))
    grid = (U, 1, steps * parts) if over == "queries" else (U, parts, steps)
    return Walk(over, grid, tuple(x.astype(jnp.int32) for x in tables), M * A, A, parts)


def _divided(x, by):
    """(quotient, remainder); lax: numpy's division rounds down, with more operations for it."""
    return (x, 0) if by == 1 else (lax.div(x, by), lax.rem(x, by))
