"""How a block of threads walks over the tiles that the mask leaves: a list for each row or column.

A list has the full tiles first and then the partial ones, so that a loop over the first has no mask
in it. Lists lie in global memory: as many tiles as there may be fit.
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

    tables are, for each batch entry, head and list, the tiles in their order (#B #N lists most) and
    how many there are of full ones and of all (#B #N lists 2).
    """

    tables: tuple[jax.Array, jax.Array]
    kinds: tuple[int, ...]  # that can occur, of FULL and PARTIAL
    tile: int  # queries or keys of a tile
    step: int  # of which so many are taken at once

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
                # lax: numpy's division rounds down, with more operations for it
                begin = lambda: (
                    order[*at, lax.div(i, parts)] * self.tile + lax.rem(i, parts) * self.step
                )
                return visit(carry, begin, kind == PARTIAL)

            carry = lax.fori_loop(first, end, body, carry)
        return carry


def walk(states, *, over: str, tile: int, step: int) -> Walk:
    """A walk along each "row" or "column" of states (#B #N tq tk)."""
    module = np if isinstance(states, np.ndarray) else jnp
    states = states.swapaxes(-1, -2) if over == "column" else states
    rank = module.where(states == FULL, 0, module.where(states == PARTIAL, 1, 2))
    order = module.argsort(rank, axis=-1, stable=True)
    counts = module.stack([(states == FULL).sum(-1), (states != EMPTY).sum(-1)], -1)
    if module is np:
        order = order[..., : max(1, counts.max())]
    tables = tuple(jnp.asarray(x, jnp.int32) for x in (order, counts))
    static = module is np
    kinds = tuple(x for x in (FULL, PARTIAL) if not static or (states == x).any())
    return Walk(tables, kinds, tile, step)
