"""How large tiles and steps are on Hopper: as large as shared memory and registers allow.

A tile is as many queries and keys, of which a mask says whether they are empty, partial or full; a
kernel keeps one side of it and takes the other in steps.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from pallas_kernels import tables

ROWS, GROUPS = 64, 2  # rows of a warpgroup, by what wgmma multiplies; warpgroups that compute
TILE = GROUPS * ROWS
WIDEST = 256  # heads, of which a warpgroup's sums take half of its registers
WIDEST_FLOAT32 = 128  # those that shared memory has room for
_SHARED = 227 * 1024 - 8 * 1024  # but for barriers, rows of sums and alignment
_MOST_STAGES = 4


class Steps(NamedTuple):
    """Queries or keys of a step, and how many steps there is room for at once."""

    size: int
    stages: int


def steps(held: Callable[[int], int], stage: Callable[[int], int], *, most: int) -> Steps:
    """The largest steps of which two fit, or else of which one does.

    held and stage say how many bytes of shared memory all steps, and each, take if of a size.
    most is what registers have room for.
    """
    found = [
        Steps(size, min(_MOST_STAGES, (_SHARED - held(size)) // stage(size)))
        for size in (128, 64, 32, 16)
        if size <= most
    ]
    return next(x for stages in (2, 1) for x in found if x.stages >= stages)


def columns(most: int, q: jax.Array, k: jax.Array, v: jax.Array) -> int:
    """Keys of a forward step: `most`, or fewer if the table of the device says so."""
    case = dict(dtype=q.dtype, head_dim=max(q.shape[-1], v.shape[-1]), implementation="pallas")
    case |= dict(length=math.sqrt(q.shape[1] * k.shape[1]))
    table = tables.here()
    if table.platform != "cuda":  # compiled ahead, or interpreted
        return most
    return min(most, table.tile("block_k", most, "dot_product_attention", **case))
