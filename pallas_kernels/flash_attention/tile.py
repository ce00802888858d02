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
    do: jax.Array | None = None  # (queries V)
    lse: Sheet | None = None
    delta: Sheet | None = None


def scores(options: Options, tiles: Tiles, place, partial: bool):
    """(soft-capped products, scores): before bias and mask, and after."""
    x = product(tiles.k[...], tiles.q[...], 1, 1) * options.scale
    if options.softcap is not None:
        x = options.softcap * jnp.tanh(x / options.softcap)
    y = x if tiles.bias is None else x + tiles.bias.read(x.shape)
    seen = _seen(options, tiles, place, x.shape) if partial else None
    return x, y if seen is None else jnp.where(seen, y, -jnp.inf)


def dropping(options: Options, tiles: Tiles, place, shape) -> Callable:
    """Drops some of a tile of weights and scales the others."""
    if options.keep is None:
        return lambda weights: weights
    t, s = (x.read(shape) for x in (tiles.t, tiles.s))
    kept = options.keep((tiles.seed[0], tiles.seed[1]), place.b, place.n, t, s)
    return lambda weights: jnp.where(kept, weights * (1 / (1 - options.rate)), 0.0)


def gradients(options: Options, tiles: Tiles, place, partial: bool):
    """(weights that made the output, gradient of scores, gradient of products)."""
    x, y = scores(options, tiles, place, partial)
    drop = dropping(options, tiles, place, y.shape)
    weights = jnp.exp(y - tiles.lse.read(y.shape))  # 0 for a query that sees nothing: lse is inf
    dweights = drop(product(tiles.v[...], tiles.do[...], 1, 1))
    dy = weights * (dweights - tiles.delta.read(y.shape))
    dx = dy
    if options.softcap is not None:
        dx = dy * (1 - (x / options.softcap) ** 2)
    return drop(weights), dy, dx * options.scale


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
