"""A score_mod within a kernel for Hopper: of a tile, and what its gradients are multiplied by."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import flash_attention as kernels
from pallas_kernels.flash_attention.mosaic_gpu import operations


class Slopes(NamedTuple):
    """What leads from the gradient of a modified score to those of what it is made of."""

    bent: jax.Array | None  # what softcap bounds, within [-1, 1]; None without
    by_score: jax.Array | None = None  # derivatives of modified scores; None without score_mod
    by_factors: tuple[jax.Array, ...] = ()

    def of_score(self, dz: jax.Array) -> jax.Array:
        """The gradient of a score, bias and all."""
        return dz if self.by_score is None else _times(dz, self.by_score)

    def of_product(self, dz: jax.Array) -> jax.Array:
        """The gradient of a scaled product."""
        dy = self.of_score(dz)
        return dy if self.bent is None else dy * (1 - self.bent * self.bent)

    def of_factors(self, dz: jax.Array) -> tuple[jax.Array, ...]:
        """The gradients of factors, as far as they come of each score."""
        return tuple(_times(dz, slope) for slope in self.by_factors)


def modified(function: Callable, *args) -> jax.Array:
    """`function(score, t, s, factors, numbers)`, all tiles."""
    return operations.rewritten(function)(*args)


def with_slopes(function: Callable, *args) -> tuple:
    """(what `modified` gives, its derivatives by scores, those by each of the factors)."""
    return operations.rewritten(_sloped(function))(*args)


def check(score_mod: kernels.ScoreMod) -> None:
    """Raises NotImplementedError if Mosaic can't lower it, or its derivatives."""
    factors, numbers = (tuple(x.dtype for x in xs) for xs in score_mod[1:])
    position = jnp.dtype(jnp.int32)
    args = jnp.dtype(jnp.float32), position, position, factors, numbers
    operations.check(_sloped(score_mod.function), *args)


def _sloped(function):
    """Forward mode: a tile has no sums, and what it doesn't select gives no NaN."""

    def run(score, t, s, factors, numbers):
        modify = lambda score, *factors: function(score, t, s, factors, numbers)
        at, places = (score, *factors), range(1 + len(factors))

        def slope(place):
            fn = lambda x: modify(*at[:place], x, *at[place + 1 :])
            return jax.jvp(fn, (at[place],), (jnp.ones_like(at[place]),))[1]

        by_score, *by_factors = map(slope, places)
        return modify(*at), by_score, tuple(by_factors)

    return run


def _times(dz, slope):
    # what has no weight may have no slope either
    return jnp.where(dz == 0, 0.0, dz * slope)
