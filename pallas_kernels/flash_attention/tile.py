"""The maths of one tile of scores, shared by the forward and the backward kernels.

A tile is (keys, queries) in float32. In a kernel, `Tiles` holds references to what a tile is made
of, and outside of it arrays or their block specs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.sheet import Sheet
from pallas_kernels.flash_attention.tile_sizes import Sizes


class Options(NamedTuple):
    """What is known while tracing."""

    scale: float
    softcap: float | None
    score_mod: Callable | None  # (score, t, s, factors, numbers) -> score, of tiles
    visible: Callable | None  # (t, s, *arrays) -> bool, of tiles
    keep: Callable | None  # (seed, b, n, t, s) -> bool, of tiles
    rate: float  # that `keep` says no
    S: int  # keys that exist
    sizes: Sizes

    @property
    def blocks(self) -> tuple[int, int]:
        """Queries and keys of a tile."""
        return self.sizes.block_q, self.sizes.block_k


class Tiles(NamedTuple):
    """What tiles are made of; None is not needed."""

    q: jax.Array  # (queries H)
    k: jax.Array  # (keys H)
    v: jax.Array  # (keys V)
    t: Sheet | None
    s: Sheet | None
    arrays: tuple[Sheet, ...]  # of the mask
    bias: Sheet | None
    sinks: jax.Array | None  # (N) scalars
    seed: jax.Array | None  # (2) scalars
    factors: tuple[Sheet, ...] = ()  # of score_mod, a number each
    numbers: tuple[Sheet, ...] = ()
    do: jax.Array | None = None  # (queries V)
    lse: Sheet | None = None
    delta: Sheet | None = None


def scores(options: Options, tiles: Tiles, place, partial: bool) -> jax.Array:
    """Scores of a tile."""
    _, y = _products(options, tiles)
    modify, factors = _modification(options, tiles, y.shape)
    return _masked(options, tiles, place, partial, modify(y, factors))


def dropping(options: Options, tiles: Tiles, place, shape) -> Callable:
    """Drops some of a tile of weights and scales the others."""
    if options.keep is None:
        return lambda weights: weights
    t, s = (x.read(shape) for x in (tiles.t, tiles.s))
    kept = options.keep((tiles.seed[0], tiles.seed[1]), place.b, place.n, t, s)
    return lambda weights: jnp.where(kept, weights * (1 / (1 - options.rate)), 0.0)


def gradients(options: Options, tiles: Tiles, place, partial: bool):
    """(weights that made the output, gradients of scores, of products, and of factors by score).

    Scores are those before score_mod.
    """
    x, y = _products(options, tiles)
    modify, factors = _modification(options, tiles, y.shape)
    y, pull = jax.vjp(modify, y, factors)
    y = _masked(options, tiles, place, partial, y)
    drop = dropping(options, tiles, place, y.shape)
    lse = tiles.lse.read(y.shape)
    weights = jnp.exp(y - lse)  # 0 for a query that sees nothing: lse is inf
    if options.score_mod is not None:  # which may have no value at what only fills up a tile
        weights = jnp.where(lse < jnp.inf, weights, 0.0)
    dweights = drop(product(tiles.v[...], tiles.do[...], 1, 1))
    dz = weights * (dweights - tiles.delta.read(y.shape))
    dy, dfactors = pull(dz)
    if options.score_mod is not None:  # or no slope
        dy, *dfactors = (jnp.where(dz == 0, 0.0, x) for x in (dy, *dfactors))
    dx = dy
    if options.softcap is not None:
        dx = dy * (1 - (x / options.softcap) ** 2)
    return drop(weights), dy, dx * options.scale, dfactors


def _products(options, tiles):
    """(soft-capped products, and with bias)."""
    x = product(tiles.k[...], tiles.q[...], 1, 1) * options.scale
    if options.softcap is not None:
        x = options.softcap * jnp.tanh(x / options.softcap)
    return x, x if tiles.bias is None else x + tiles.bias.read(x.shape)


def _modification(options, tiles, shape):
    """(score_mod as a function of scores and factors, factors)."""
    if options.score_mod is None:
        return lambda y, factors: y, ()
    t, s, *numbers = (x.read(shape) for x in (tiles.t, tiles.s, *tiles.numbers))
    factors = tuple(x.read(shape) for x in tiles.factors)
    return lambda y, factors: options.score_mod(y, t, s, factors, tuple(numbers)), factors


def _masked(options, tiles, place, partial, y):
    seen = _seen(options, tiles, place, y.shape) if partial else None
    return y if seen is None else jnp.where(seen, y, -jnp.inf)


def product(a, b, axis_a: int, axis_b: int):
    """Contracts an axis of each in float32; float32 weights meet narrower values in their dtype."""
    dtype = min(a.dtype, b.dtype, key=lambda x: x.itemsize)
    dimensions = ((axis_a,), (axis_b,)), ((), ())
    a, b = a.astype(dtype), b.astype(dtype)
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _seen(options, tiles, place, shape):
    """What queries see in a tile; None is everything."""
    seen = None
    _, block_k = options.blocks
    if options.S % block_k:  # keys that only fill up the last tile
        key = lax.broadcasted_iota(jnp.int32, shape, 0)
        seen = place.column * block_k + key < options.S
    if options.visible is not None:
        t, s = (x.read(shape) for x in (tiles.t, tiles.s))
        visible = options.visible(t, s, *(x.read(shape) for x in tiles.arrays))
        seen = visible if seen is None else seen & visible
    return seen
