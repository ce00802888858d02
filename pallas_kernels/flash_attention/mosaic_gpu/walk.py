"""What a block of threads walks along: lists of the tiles that the mask leaves.

A list is of a row or of a column of tiles, or of the batch entries and heads of one tile. It has
the full ones first and then the partial ones, so that a loop over the first has no mask in it.
Lists lie in global memory: as many tiles as there may be fit.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.flash_attention.walk import EMPTY, FULL, PARTIAL


@dataclasses.dataclass(frozen=True)
class Walk:
    """The lists, and how they are walked along.

    tables are, for each batch entry, head and list, what it names in its order (#B #N lists most)
    and how many there are of full ones and of all (#B #N lists 2).
    """

    tables: tuple[jax.Array, jax.Array]
    kinds: tuple[int, ...]  # that can occur, of FULL and PARTIAL
    tile: int  # queries or keys of what is named
    step: int  # of which so many are taken at once

    @property
    def most(self) -> int:
        """What the longest list may name."""
        return self.tables[0].shape[-1]

    def each(self, tables, at: tuple, visit: Callable, carry):
        """`carry = visit(carry, begin, partial)` for the steps of the list at (b, n, list).

        tables are references to the tables. begin() is the first query or key of a step.
        """
        order, counts = tables
        whole = [i if n > 1 else 0 for i, n in zip(at[:2], order.shape[:2], strict=True)]
        at, parts = (*whole, at[2]), self.tile // self.step
        full, all_ = (counts[*at, i] * parts for i in range(2))
        for kind, first, end in ((FULL, 0, full), (PARTIAL, full, all_)):
            if kind not in self.kinds:
                continue

            def body(i, carry, kind=kind):
                def begin():
                    entry, part = split(i, parts)
                    return order[*at, entry] * self.tile + part * self.step

                return visit(carry, begin, kind == PARTIAL)

            carry = lax.fori_loop(first, end, body, carry)
        return carry


def walk(states, *, over: str, tile: int, step: int) -> Walk:
    """A walk along each "row" or "column" of states (#B #N tq tk)."""
    lists = states.swapaxes(-1, -2) if over == "column" else states
    return _listed(lists, _kinds(states), tile, step)


def members(states, counts: tuple[int, int], blocks: tuple[int, int]) -> Walk:
    """A walk for each tile of states (#B #N tq tk), along the batch entries and heads of a block.

    counts are those of batch entries and heads, blocks those of blocks for them.
    """
    b, n = (count // block for count, block in zip(counts, blocks, strict=True))
    shape = [
        count if count > block else length
        for count, block, length in zip(counts, blocks, states.shape[:2], strict=True)
    ]
    x = jnp.broadcast_to(states, (*shape, *states.shape[2:]))
    x = x.reshape(shape[0] // b, b, shape[1] // n, n, -1).transpose(0, 2, 4, 1, 3)
    return _listed(x.reshape(*x.shape[:3], b * n), _kinds(states), 1, 1)


def split(i, size: int):
    """Which run of `size` an index is in, and where in it."""
    # lax: numpy's division rounds down, with more operations for it
    return (i, 0) if size == 1 else (lax.div(i, size), lax.rem(i, size))


def _kinds(states):
    """Those that can occur, of FULL and PARTIAL."""
    static = isinstance(states, np.ndarray)
    return tuple(x for x in (FULL, PARTIAL) if not static or (states == x).any())


def _listed(states, kinds, tile, step):
    """A walk along the last axis of states."""
    module = np if isinstance(states, np.ndarray) else jnp
    rank = module.where(states == FULL, 0, module.where(states == PARTIAL, 1, 2))
    order = module.argsort(rank, axis=-1, stable=True)
    counts = module.stack([(states == FULL).sum(-1), (states != EMPTY).sum(-1)], -1)
    if module is np:
        order = order[..., : max(1, counts.max())]
    tables = tuple(jnp.asarray(x, jnp.int32) for x in (order, counts))
    return Walk(tables, kinds, tile, step)
