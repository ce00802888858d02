"""The forward kernel: an online softmax over key tiles, for each query tile.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax"; Dao,
"FlashAttention-2", algorithm 1.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.flash_attention import call as calls
from pallas_kernels.flash_attention import tile as maths
from pallas_kernels.flash_attention import walk as walks


def attend(options: maths.Options, tiles: maths.Tiles, states, *, interpret):
    """[output (B N T V) in v's dtype, lse (B N 1 T) in float32], with T in whole tiles."""
    (B, N, T, _), V, (bq, _) = tiles.q.shape, tiles.v.shape[-1], options.blocks
    walk = walks.walk(states, B=B, N=N, over="row")
    return calls.call(
        functools.partial(_kernel, options),
        walk,
        options,
        tiles,
        out_like=[
            jax.ShapeDtypeStruct((B, N, T, V), tiles.v.dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
        ],
        out_specs=[
            calls.spec(walk, (bq, V), lambda at: (at.b, at.n, at.row, 0)),
            calls.spec(walk, (1, bq), lambda at: (at.b, at.n, 0, at.row)),
        ],
        scratch=[(V, bq), (1, bq), (1, bq)],
        products=2,
        interpret=interpret,
        name="flash_attention",
    )


def _kernel(options, walk, place, tiles, o_ref, lse_ref, sum_ref, peak_ref, total_ref):
    @pl.when(place.first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        # a sink has a logit and no value
        sink = None if tiles.sinks is None else tiles.sinks[place.n]
        peak_ref[...] = jnp.full_like(peak_ref, -jnp.inf if sink is None else sink)
        total_ref[...] = jnp.full_like(total_ref, 0 if sink is None else 1)

    def add(partial):
        y = maths.scores(options, tiles, place, partial)
        peak = peak_ref[...]
        higher = jnp.maximum(peak, y.max(0, keepdims=True))
        shift = jnp.where(higher == -jnp.inf, 0.0, higher)  # -inf - -inf is NaN
        weights, decay = jnp.exp(y - shift), jnp.exp(peak - shift)
        peak_ref[...] = higher
        total_ref[...] = total_ref[...] * decay + weights.sum(0, keepdims=True)
        weights = maths.dropping(options, tiles, place, y.shape)(weights)
        sum_ref[...] = sum_ref[...] * decay + maths.product(tiles.v[...], weights, 0, 0)

    walk.on_tile(place.state, add)

    @pl.when(place.last)
    def _():
        total = total_ref[...]
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        o_ref[...] = (sum_ref[...] / total).T.astype(o_ref.dtype)
        lse_ref[...] = jnp.where(seen, peak_ref[...] + jnp.log(total), -jnp.inf)
