"""The maths of one tile of scores, shared by the forward and the backward kernels.

A tile is (keys, queries) in float32. In a kernel, `Tiles` holds references to what a tile is made
of, and outside of it arrays or their block specs.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention import tile as maths


class Options(NamedTuple):
    """What is known while tracing."""

    scale: float
    visible: Callable | None  # (t, s, *by_query, *by_key) -> bool, of tiles
    S: int  # keys that exist
    block: int  # keys of a block
    parts: int  # tiles that a block is cut into


class Tiles(NamedTuple):
    """What tiles are made of; what is one number a token lies in rows. None is not needed."""

    q: jax.Array  # (queries H)
    k: jax.Array  # (keys H)
    v: jax.Array  # (keys V)
    by_query: tuple[jax.Array, ...]  # positions and what else the mask needs, (1 queries)
    by_key: tuple[jax.Array, ...]  # (1 keys)
    do: jax.Array | None = None  # (queries V)
    lse: jax.Array | None = None  # (1 queries)
    delta: jax.Array | None = None  # (1 queries)


def scores(options: Options, tiles: Tiles, place) -> jax.Array:
    """Scaled products, -inf where nothing is seen."""
    x = maths.product(tiles.k[...], tiles.q[...], 1, 1) * options.scale
    seen = _seen(options, tiles, place, x.shape)
    return x if seen is None else jnp.where(seen, x, -jnp.inf)


def gradients(options: Options, tiles: Tiles, place) -> tuple[jax.Array, jax.Array]:
    """(weights, gradient of products)."""
    weights = jnp.exp(scores(options, tiles, place) - tiles.lse[...])  # 0 for lse inf: no query
    dweights = maths.product(tiles.v[...], tiles.do[...], 1, 1)
    return weights, weights * (dweights - tiles.delta[...]) * options.scale


def _seen(options, tiles, place, shape):
    """What queries see in a tile; None is everything."""
    nth = place.part * shape[0] + lax.broadcasted_iota(jnp.int32, shape, 0)  # key of the block
    s = place.block * options.block + nth
    seen = []
    if options.parts * shape[0] > options.block:  # keys that only fill up the last part
        seen.append(nth < options.block)
    if options.S % options.block:  # and those of the last block
        seen.append(s < options.S)
    if options.visible is not None:
        rows = [jnp.broadcast_to(x[...], shape) for x in tiles.by_query]
        columns = [jnp.broadcast_to(x[...].reshape(-1, 1), shape) for x in tiles.by_key]
        seen.append(options.visible(rows[0], s, *rows[1:], *columns))
    return functools.reduce(operator.and_, seen) if seen else None
