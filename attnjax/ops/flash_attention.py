"""Softmax attention by a Pallas kernel for TPU: what tiles it takes, and what it is called with."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import masks
from attnjax.ops import flash_arguments
from pallas_kernels import flash_attention as kernels

_STEP = 2**18  # what a tile costs beside its entries, in entries: a third of a microsecond


def flash_attention(q, k, v, t, s, *, plan=None, interpret=False, **options):
    """(output, lse) as `ops.dot_product_attention` defines them; reverse mode only.

    t (T) and s (S) are the positions of queries and keys; plan is theirs, where it is made already;
    options are those of `flash_arguments`. Raises NotImplementedError for masks with too many
    tiles, and for a score_mod that looks up by position.
    """
    plan = plan or plan_of(q, k, v, t, s, *(options[x] for x in ("mask", "bias", "score_mod")))
    blocks = plan.sizes[:2]
    args, options = flash_arguments.arguments(q, k, v, t, s, plan.states, blocks, **options)
    return kernels.flash_attention(*args, sizes=plan.sizes, interpret=interpret, **options)


class Plan(NamedTuple):
    """Tiles, and what is seen of each."""

    states: jax.Array | np.ndarray
    sizes: kernels.Sizes


def plan_of(q, k, v, t, s, mask, bias, score_mod) -> Plan:
    """The tiles to take: if the mask is known while tracing, those that cost least."""
    known = all(isinstance(x, np.ndarray) for x in (t, s, *jax.tree.leaves(mask)))
    sheets = sum(x is not None and min(x.shape[2:]) > 1 for x in (bias,))
    sheets += score_mod is not None  # what it computes takes the place of a sheet
    sizes = kernels.choices(q, k, v, sheets=sheets)
    if blocks := list(_blocks(mask)):  # tiles within blocks need no mask, and can be skipped
        sizes = [_within(blocks, sizes[0])]
    cost = lambda plan: (plan.states != kernels.EMPTY).sum() * (math.prod(plan.sizes[:2]) + _STEP)
    plans = [
        Plan(states_of(mask, t, s, size[:2]), size) for size in (sizes if known else sizes[:1])
    ]
    return min(plans, key=cost) if known else plans[0]


def states_of(mask, t, s, blocks: tuple[int, int]) -> jax.Array | np.ndarray:
    """EMPTY, PARTIAL or FULL for tiles (#B #N tq tk) of `blocks` queries and keys."""
    rows, columns = (masks.tile_positions(x, n) for x, n in zip((t, s), blocks, strict=True))
    if mask is None:
        states = np.full((1, 1, len(rows), len(columns)), masks.FULL)
    else:
        states = mask.tiles(rows, columns)
    if len(s) % blocks[1]:  # the last column has keys that don't exist
        most = np.where(np.arange(len(columns)) < len(columns) - 1, masks.FULL, masks.PARTIAL)
        module = np if isinstance(states, np.ndarray) else jnp
        states = module.minimum(states, most[None, None, None])
    return states


def _within(blocks, sizes):
    """Sizes that divide all blocks (queries, keys) of a mask, where the kernel can have them."""

    def divides(size, *blocks):
        sizes = range(kernels.LANES, size + 1, kernels.LANES)
        return max((x for x in sizes if math.gcd(*blocks) % x == 0), default=size)

    q, k = (divides(size, *x) for size, x in zip(sizes[:2], zip(*blocks, strict=True), strict=True))
    return sizes._replace(block_q=q, block_k=k)


def _blocks(mask):
    """Sizes of all block selections in a mask."""
    if isinstance(mask, masks.Blocks):
        yield mask.block_q, mask.block_k
    for part in getattr(mask, "parts", ()):
        yield from _blocks(part)
