"""Where blocks of threads and their steps are among scores."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from jax import lax

from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import TILE
from pallas_kernels.flash_attention.mosaic_gpu.walk import Walk, split

Over = Literal["row", "column", "tile"]


class Place(NamedTuple):
    """Where a step is."""

    b: Any  # batch entry
    n: Any  # query head
    row: Any  # the first row of all warpgroups
    column: Callable | None  # () -> the first column of the step; None before there is one
    counts: tuple[int, int]  # of batch entries and query heads


@dataclasses.dataclass(frozen=True)
class Frame:
    """What each block of threads has to do.

    Over a row or a column of tiles: all steps along it, for the query heads of a block one after
    the other. Over a tile: a step of it, for the batch entries and query heads of a block.
    """

    over: Over
    counts: tuple[int, int]  # batch entries and query heads
    blocks: tuple[int, int]  # of threads, for them
    tiles: tuple[int, int]  # along rows and columns
    step: int  # columns of scores that are taken at once

    @property
    def grid(self) -> tuple[int, int, int]:
        """(batch, head, tile)."""
        rows, columns = self.tiles
        return *self.blocks, rows * columns * self._parts if self.over == "tile" else rows

    def scores(self, most: int) -> int:
        """How many scores all blocks visit, if lists name `most`."""
        (_, N), (B, heads), (rows, columns) = self.counts, self.blocks, self.tiles
        visited = B * heads * columns if self.over == "tile" else B * N
        return visited * rows * most * TILE**2

    def first(self, block: tuple) -> Place:
        """The place of a block (batch, head, tile), as long as it hasn't begun."""
        b, n = (i * size for i, size in zip(block[:2], self._members, strict=True))
        if self.over != "tile":
            return Place(b, n, block[2] * TILE, None, self.counts)
        tile, part = split(block[2], self._parts)
        row, column = split(tile, self.tiles[1])
        return Place(b, n, row * TILE, lambda: column * TILE + part * self.step, self.counts)

    def each(self, walk: Walk, tables, block: tuple, visit: Callable, carry):
        """`carry = visit(carry, place, partial)` for the steps of a block."""
        first, (_, heads) = self.first(block), self._members
        if self.over == "tile":

            def of_member(carry, member, partial):
                b, n = split(member(), heads)
                return visit(carry, first._replace(b=first.b + b, n=first.n + n), partial)

            at = *block[:2], split(block[2], self._parts)[0]
            return walk.each(tables, at, of_member, carry)

        def of_head(i, carry):
            n = first.n + i
            step = lambda carry, begin, partial: visit(
                carry, first._replace(n=n, column=begin), partial
            )
            return walk.each(tables, (first.b, n, block[2]), step, carry)

        return of_head(0, carry) if heads == 1 else lax.fori_loop(0, heads, of_head, carry)

    @property
    def _parts(self):
        """Steps of a tile."""
        return TILE // self.step

    @property
    def _members(self):
        """Batch entries and query heads of a block."""
        return tuple(n // blocks for n, blocks in zip(self.counts, self.blocks, strict=True))
