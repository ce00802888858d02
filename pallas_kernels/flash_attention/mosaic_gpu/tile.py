"""The maths of one tile of scores, shared by the forward and the backward kernels.

A tile has rows, of what a warpgroup keeps, and columns, of what it meets: queries and keys, or keys
and queries. Exponents are of base 2, which is what the hardware has.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import ROWS, TILE

LOG2E = math.log2(math.e)


class Options(NamedTuple):
    """What is known while tracing."""

    scale: float
    softcap: float | None
    visible: Callable | None  # (t, s, *arrays) -> bool, of tiles
    S: int  # keys that exist


class Asked(NamedTuple):
    """What the mask needs; None is not needed."""

    t: Any
    s: Any
    arrays: tuple


def product(a, b) -> jax.Array:
    """a b in float32, of references to shared memory."""

    def multiply(sums):
        plgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def scores(options: Options, products: jax.Array):
    """(what softcap bounds, within [-1, 1]; scores in base 2), before the mask."""
    if options.softcap is None:
        return None, products * (options.scale * LOG2E)
    # the hardware's own tanh has 11 bits
    grown = jnp.exp2(products * (2 * LOG2E * options.scale / options.softcap))
    bent = 1 - 2 / (1 + grown)
    return bent, bent * (options.softcap * LOG2E)


def bend(bent: jax.Array | None, dy: jax.Array) -> jax.Array:
    """The gradient of scaled products, from that of scores."""
    return dy if bent is None else dy * (1 - bent * bent)


def masked(options: Options, asked: Asked, work, step, over: str, y: jax.Array) -> jax.Array:
    """Scores of a partial tile, -inf where a query doesn't see."""
    begin, keys = (work.begin, step.begin()), 1 if over == "row" else 0
    seen = None
    if options.S % TILE:  # keys that only fill up the last tile
        seen = begin[keys] + lax.broadcasted_iota(jnp.int32, y.shape, keys) < options.S
    if options.visible is not None:
        read = lambda x: x.read(work.b, step.n, begin, y.shape)
        visible = options.visible(read(asked.t), read(asked.s), *map(read, asked.arrays))
        seen = visible if seen is None else seen & visible
    return y if seen is None else jnp.where(seen, y, -jnp.inf)


def along(x: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """One number for each row (axis 0) or column (axis 1), over a tile."""
    return lax.broadcast_in_dim(x, shape, (axis,))


def rows(reference, b, head, begin) -> jax.Array:
    """One number for each row, of an array (B heads L) in global memory."""
    part = reference.at[b, head, pl.ds(begin, ROWS)]
    return plgpu.load(part, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def columns(reference) -> jax.Array:
    """One number for each column, which was fetched."""
    return plgpu.load(reference, layout=plgpu.Layout.WGMMA.reduce(0))
