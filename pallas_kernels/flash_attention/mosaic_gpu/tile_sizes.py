"""How large tiles and steps are on Hopper: as large as shared memory and registers allow.

A tile is as many queries and keys, of which a mask says whether they are empty, partial or full; a
kernel keeps one side of it and takes the other in steps.
"""

from typing import NamedTuple

ROWS, GROUPS = 64, 2  # rows of a warpgroup, by what wgmma multiplies; warpgroups that compute
TILE = GROUPS * ROWS
WIDEST = 256  # heads, of which a warpgroup's sums take half of its registers
_SHARED = 227 * 1024 - 8 * 1024  # but for barriers, rows of sums and alignment
_MOST_STAGES = 4


class Steps(NamedTuple):
    """Queries or keys of a step, and how many steps there is room for at once."""

    size: int
    stages: int


def steps(kept: int, fetched: int, scores: int, *, most: int) -> Steps:
    """The largest steps of which two fit.

    Args:
      kept: numbers of 16 bits that are kept for each row.
      fetched: those that are fetched for each column.
      scores: how many tiles of scores pass through shared memory.
      most: columns that the registers have room for.
    """
    for size in (128, 64, 32):
        room = _SHARED - 2 * TILE * (kept + scores * size)
        stages = min(_MOST_STAGES, room // (2 * size * fetched))
        if size <= most and stages >= 2:
            return Steps(size, stages)
    raise AssertionError(f"{kept=} and {fetched=} must leave room for two steps")
