"""The gradients of a tile of scores, shared by the backward kernels, and how large a tile is."""

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.mosaic_gpu.options import Options
from pallas_kernels.flash_attention.mosaic_gpu.score_mod import Slopes
from pallas_kernels.flash_attention.mosaic_gpu.tile import Tile

_MOST = 64  # columns that registers hold beside sums
_FEW, _WIDE = 32, 128  # those beside slopes and sums of more features: with 64 registers spill


def columns(options: Options, features: int = 0) -> int:
    """The most columns of a step, where sums of so many features are made."""
    return _FEW if options.score_mod is not None and features > _WIDE else _MOST


def weights(tile: Tile, found: dict) -> tuple[Slopes, jax.Array]:
    """(what gradients of modified scores are multiplied by, weights), of what is ready."""
    slopes, z = tile.sloped(found)
    lse = tile.by_query(found["lse"], z.shape)
    p = jnp.exp2(z - lse)
    if tile.options.score_mod is not None:  # which may have no value at what only fills up a tile
        p = jnp.where(lse < jnp.inf, p, 0.0)
    return slopes, p


def dscores(tile: Tile, found: dict, weights, drop) -> jax.Array:
    """The gradient of modified scores."""
    dweights = drop(tile.products(found["do"], found["v"]))
    return weights * (dweights - tile.by_query(found["delta"], weights.shape))
