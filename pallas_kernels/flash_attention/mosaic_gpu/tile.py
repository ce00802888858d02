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

from pallas_kernels.flash_attention.mosaic_gpu.sheet import Sheet
from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import TILE
from pallas_kernels.flash_attention.mosaic_gpu.work import Step

LOG2E = math.log2(math.e)


class Options(NamedTuple):
    """What is known while tracing."""

    scale: float
    softcap: float | None
    visible: Callable | None  # (t, s, *arrays) -> bool, of tiles
    S: int  # keys that exist
    keep: Callable | None = None  # (seed, b, n, t, s) -> bool, of tiles
    rate: float = 0.0  # that `keep` says no


class Asked(NamedTuple):
    """What stays in global memory: of the mask, dropout, bias; None is not needed."""

    t: Sheet | None
    s: Sheet | None
    arrays: tuple[Sheet, ...]
    seed: Any = None  # two numbers
    bias: Sheet | None = None  # of rows or of columns


class Tile(NamedTuple):
    """A tile of scores."""

    options: Options
    asked: Asked
    step: Step
    queries: int = 0  # the axis that they are along
    partial: bool = False

    def products(self, by_query, by_key) -> jax.Array:
        """Products of queries with keys, of references to shared memory."""
        return product(by_key, by_query.T) if self.queries else product(by_query, by_key.T)

    def scores(self, found: dict):
        """(what softcap bounds, within [-1, 1]; scores in base 2), of what is ready."""
        bent, y = self._capped(self.products(found["q"], found["k"]))
        bias = found["bias"][...] if "bias" in found else None
        bias = self.read(self.asked.bias, y.shape) if self.asked.bias else bias
        y = y if bias is None else y + bias.astype(jnp.float32) * LOG2E
        return bent, self._masked(y) if self.partial else y

    def dropping(self, shape: tuple[int, int]) -> Callable:
        """The function that drops entries of a tile, and grows the others."""
        if self.options.keep is None:
            return lambda weights: weights
        seed, place = [self.asked.seed[i] for i in range(2)], self.step.place
        t, s = (self.read(x, shape) for x in (self.asked.t, self.asked.s))
        kept = self.options.keep(seed, place.b, place.n, t, s)
        return lambda weights: jnp.where(kept, weights * (1 / (1 - self.options.rate)), 0.0)

    def by_query(self, reference, shape: tuple[int, int]) -> jax.Array:
        """One number for each query, over a tile."""
        read = columns if self.queries else rows
        return along(read(reference), shape, self.queries)

    def read(self, sheet: Sheet, shape: tuple[int, int]) -> jax.Array:
        """The part of a sheet."""
        return sheet.read(self.step.place.b, self.step.place.n, self.step.begin, shape)

    def _capped(self, products):
        scale, softcap = self.options.scale * LOG2E, self.options.softcap
        if softcap is None:
            return None, products * scale
        # the hardware's own tanh has 11 bits
        bent = 1 - 2 / (1 + jnp.exp2(products * (2 * scale / softcap)))
        return bent, bent * (softcap * LOG2E)

    def _masked(self, y):
        """Scores of a partial tile, -inf where a query doesn't see."""
        options, asked, keys = self.options, self.asked, 1 - self.queries
        seen = None
        if options.S % TILE:  # keys that only fill up the last tile
            at = self.step.begin[keys] + lax.broadcasted_iota(jnp.int32, y.shape, keys)
            seen = at < options.S
        if options.visible is not None:
            read = (self.read(x, y.shape) for x in (asked.t, asked.s, *asked.arrays))
            visible = options.visible(*read)
            seen = visible if seen is None else seen & visible
        return y if seen is None else jnp.where(seen, y, -jnp.inf)


def product(a, b) -> jax.Array:
    """a b in float32, of references to shared memory."""

    def multiply(sums):
        plgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def factor(x: jax.Array, dtype) -> jax.Array:
    """x as a product takes it: float32 rounded to TF32, of which it would cut off the rest."""
    if dtype != jnp.float32:
        return x.astype(dtype)
    half, rest = 1 << 12, (1 << 13) - 1
    bits = lax.bitcast_convert_type(x, jnp.int32) + half
    return lax.bitcast_convert_type(bits & ~rest, jnp.float32)


def bend(bent: jax.Array | None, dy: jax.Array) -> jax.Array:
    """The gradient of scaled products, from that of scores."""
    return dy if bent is None else dy * (1 - bent * bent)


def along(x: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """One number for each row (axis 0) or column (axis 1), over a tile."""
    return lax.broadcast_in_dim(x, shape, (axis,))


def rows(reference) -> jax.Array:
    """One number for each row, which is in shared memory."""
    return plgpu.load(reference, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def columns(reference) -> jax.Array:
    """One number for each column, which was fetched."""
    return plgpu.load(reference, layout=plgpu.Layout.WGMMA.reduce(0))
