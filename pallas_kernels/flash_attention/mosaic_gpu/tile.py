"""The maths of one tile of scores, shared by the forward and the backward kernels.

A tile has rows, of what a warpgroup keeps, and columns, of what it meets: queries and keys, or keys
and queries. Exponents are of base 2, which is what the hardware has.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.mosaic_gpu import score_mod as score_mods
from pallas_kernels.flash_attention.mosaic_gpu.options import Asked, Options
from pallas_kernels.flash_attention.mosaic_gpu.score_mod import Slopes
from pallas_kernels.flash_attention.mosaic_gpu.sheet import Sheet
from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import TILE
from pallas_kernels.flash_attention.mosaic_gpu.work import Step

LOG2E = math.log2(math.e)


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

    def scores(self, found: dict) -> jax.Array:
        """Scores in base 2, of what is ready."""
        _, y = self._raw(found)
        if self.options.score_mod is not None:
            y = score_mods.modified(*self._modification(y)) * LOG2E
        return self._masked(y) if self.partial else y

    def sloped(self, found: dict) -> tuple[Slopes, jax.Array]:
        """(what gradients are multiplied by, scores in base 2), of what is ready."""
        bent, y = self._raw(found)
        slopes = Slopes(bent)
        if self.options.score_mod is not None:
            y, *slopes = score_mods.with_slopes(*self._modification(y))
            y, slopes = y * LOG2E, Slopes(bent, *slopes)
        return slopes, self._masked(y) if self.partial else y

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

    def _raw(self, found):
        """(what softcap bounds; scores with bias, in base 2 unless they are to be modified)."""
        unit = LOG2E if self.options.score_mod is None else 1.0
        bent, y = self._capped(self.products(found["q"], found["k"]), unit)
        bias = found["bias"][...] if "bias" in found else None
        bias = self.read(self.asked.bias, y.shape) if self.asked.bias else bias
        return bent, y if bias is None else y + bias.astype(jnp.float32) * unit

    def _modification(self, y):
        """(score_mod, all that it takes)."""
        asked, read = self.asked, lambda sheet: self.read(sheet, y.shape)
        of_heads = (tuple(map(read, x)) for x in (asked.factors, asked.numbers))
        return self.options.score_mod, y, read(asked.t), read(asked.s), *of_heads

    def _capped(self, products, unit):
        scale, softcap = self.options.scale, self.options.softcap
        if softcap is None:
            return None, products * (scale * unit)
        # the hardware's own tanh has 11 bits
        bent = 1 - 2 / (1 + jnp.exp2(products * (2 * scale * LOG2E / softcap)))
        return bent, bent * (softcap * unit)

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


def along(x: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """One number for each row (axis 0) or column (axis 1), over a tile."""
    return lax.broadcast_in_dim(x, shape, (axis,))


def rows(reference) -> jax.Array:
    """One number for each row, which is in shared memory."""
    return plgpu.load(reference, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def columns(reference) -> jax.Array:
    """One number for each column, which was fetched."""
    return plgpu.load(reference, layout=plgpu.Layout.WGMMA.reduce(0))
