"""How a grid walks over the tiles of a score matrix: only over those that the mask leaves.

A grid is (batch entries, heads, steps, inner). A list of steps, which the kernel has before its
blocks are fetched, names each step's tile; the tiles of one accumulator follow one another. Inner
walks the batch entries and heads that add to the same accumulator.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

EMPTY, PARTIAL, FULL = 0, 1, 2
_FIRST, _LAST, _IDLE = 1, 2, 4
MOST_STATES = 2**16  # with as many steps they take half of a TPU's scalar memory

Over = Literal["row", "column", "tile", "all"]  # the tiles that one accumulator sums over


@dataclasses.dataclass(frozen=True)
class Walk:
    """A grid with its tables; `at` reads them where they lie, in scalar memory.

    batches and heads are those that add to one accumulator.
    """

    grid: tuple[int, int, int | jax.Array, int]
    tables: tuple[jax.Array, jax.Array]  # steps and states, flat
    batches: int
    heads: int
    units: tuple[int, int, int]  # shape of the steps: (#b #n steps)
    states: tuple[int, int, int, int]  # shape of the states: (#B #N tq tk)
    kinds: tuple[int, ...]  # that can occur, of PARTIAL and FULL

    @property
    def tiles(self) -> int:
        """How many tiles the grid visits, at most."""
        return self.grid[0] * self.grid[1] * self.units[2] * self.grid[3]

    def at(self, ids, tables) -> "Place":
        """The place of grid indices."""
        unit_b, unit_n, step, inner = ids
        word = tables[0][_flat(self.units, unit_b, unit_n, step)]
        # lax: numpy's division rounds down, with more operations for it
        b = unit_b * self.batches + lax.div(inner, self.heads) if self.batches > 1 else unit_b
        n = unit_n * self.heads + lax.rem(inner, self.heads) if self.heads > 1 else unit_n
        return Place(self, tables[1], word, inner, b, n, word >> 17, (word >> 3) & 0x3FFF)

    def on_tile(self, state, body):
        """Runs `body(partial)` unless the tile is empty."""
        for kind in self.kinds:
            pl.when(state == kind)(functools.partial(body, kind == PARTIAL))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a step of the grid is; scalars."""

    walk: Walk
    states: Any  # the table, or the reference to it
    word: Any  # of the table of steps
    inner: Any
    b: Any  # batch entry
    n: Any  # query head
    row: Any  # query tile
    column: Any  # key tile

    @property
    def first(self) -> jax.Array:
        """Whether the accumulator begins here."""
        return (self.word & _FIRST != 0) & (self.inner == 0)

    @property
    def last(self) -> jax.Array:
        """Whether the accumulator is complete after this."""
        return (self.word & _LAST != 0) & (self.inner == self.walk.grid[3] - 1)

    @property
    def state(self) -> jax.Array:
        """EMPTY, PARTIAL or FULL."""
        index = _flat(self.walk.states, self.b, self.n, self.row, self.column)
        return jnp.where(self.word & _IDLE != 0, EMPTY, self.states[index])


def walk(states, *, B: int, N: int, over: Over, batches: int = 1, heads: int = 1) -> Walk:
    """A walk over all but empty tiles of states (#B #N tq tk); numpy gives a static grid.

    An accumulator without such a tile is visited once, so that it is written.
    """
    words, count = _steps(states, over, batches, heads)
    grid = B // batches, N // heads, count, batches * heads
    tables = tuple(jnp.asarray(x, jnp.int32).reshape(-1) for x in (words, states))
    static = isinstance(states, np.ndarray)
    kinds = tuple(x for x in (PARTIAL, FULL) if not static or (states == x).any())
    return Walk(grid, tables, batches, heads, words.shape, states.shape, kinds)


def _flat(shape, *index):
    """The flat index into an array of `shape`, whose axes of length 1 are for every index."""
    at = 0
    for length, i in zip(shape, index, strict=True):
        at = at * length + (i if length > 1 else 0)
    return at


def _steps(states, over, batches, heads):
    """(words (#b #n steps), steps to take): each word is row, column and flags."""
    module = np if isinstance(states, np.ndarray) else jnp
    needed = _united(states, batches, heads) != EMPTY
    *units, tq, tk = needed.shape
    row, column = np.divmod(np.arange(tq * tk).reshape(1, 1, tq, tk), tk)
    where = row << 17 | column << 3
    match over:  # the last axes become: accumulators, tiles of each
        case "column":
            needed, where = needed.swapaxes(-1, -2), where.swapaxes(-1, -2)
        case "tile" | "all":
            shape = (-1, 1) if over == "tile" else (1, -1)
            needed, where = needed.reshape(*units, *shape), where.reshape(1, 1, *shape)
    leading = np.arange(needed.shape[-1])[None, None, None] == 0
    needed = needed | (~needed.any(-1, keepdims=True) & leading)
    seen = needed.cumsum(-1)
    first, last = needed & (seen == 1), needed & (seen == seen[..., -1:])
    words = where + _LAST * last + _FIRST * first
    return _compact(module, words.reshape(*units, -1), needed.reshape(*units, -1))


def _compact(module, words, needed):
    """The needed words, filled up by the last one's tile: its blocks are there already."""
    order = module.argsort(~needed, axis=-1, stable=True)
    own = needed.sum(-1, keepdims=True)
    count = own.max()
    if module is np:
        order, count = order[..., :count], int(count)
    step = np.arange(order.shape[-1])[None, None]
    order = module.take_along_axis(order, module.minimum(step, own - 1), -1)
    words = module.take_along_axis(words, order, -1)
    words = module.where(step < own, words, words & ~(_FIRST | _LAST) | _IDLE)
    return words.astype(np.int32), count


def _united(states, batches, heads):
    """The states of all batch entries and heads that are walked together."""
    for axis, size in ((0, batches), (1, heads)):
        if states.shape[axis] > 1:
            shape = *states.shape[:axis], -1, size, *states.shape[axis + 1 :]
            states = states.reshape(shape).max(axis + 1)
    return states


def fits(shape: tuple[int, ...]) -> bool:
    """Whether there is scalar memory for states of this shape."""
    return math.prod(shape) <= MOST_STATES
