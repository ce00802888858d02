"""The backward kernels: each tile's weights again from lse, and sums over rows, columns or tiles.

    dz_ts = p_ts (drop(do_t . v_s) - delta_t),    dy = score_mod'(y) dz
    dx_ts = scale (1 - (x_ts / softcap)^2) dy_ts
    dq_t = sum_s dx_ts k_s,    dk_s = sum_t dx_ts q_t,    dv_s = sum_t drop(p)_ts do_t

p = exp(z - lse), z = score_mod(y), delta = do . o - dlse, and dbias is dy. Each sum is made by one
accumulator, in a fixed order, so results are the same each time. Source: Dao, "FlashAttention-2",
algorithm 2.

Unlike there: a kernel for each of (dq), (dk, dv), (dbias) and (dfactors), so that none needs atomic
additions, and what nobody asks for falls away in compilation.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.flash_attention import call as calls
from pallas_kernels.flash_attention import tile as maths
from pallas_kernels.flash_attention import walk as walks


def queries(options: maths.Options, tiles: maths.Tiles, states, *, interpret) -> jax.Array:
    """The gradient of tiles.q."""
    (B, N, _, H), (bq, _) = tiles.q.shape, options.blocks
    walk = walks.walk(states, B=B, N=N, over="row")

    def sums(place, partial, tiles):
        _, _, dx, _ = maths.gradients(options, tiles, place, partial)
        return (maths.product(tiles.k[...], dx, 0, 0),)

    [dq] = calls.call(
        _sum(sums, finish=jnp.transpose),
        walk,
        options,
        tiles,
        out_like=[tiles.q],
        out_specs=[calls.spec(walk, (bq, H), lambda at: (at.b, at.n, at.row, 0))],
        scratch=[(H, bq)],
        products=3,
        interpret=interpret,
        name="flash_attention_dq",
    )
    return dq


def keys_and_values(options: maths.Options, tiles: maths.Tiles, states, *, interpret):
    """The gradients of tiles.k and tiles.v."""
    (B, K, _, H), V, (_, bk) = tiles.k.shape, tiles.v.shape[-1], options.blocks
    G = tiles.q.shape[1] // K
    walk = walks.walk(states, B=B, N=K * G, over="column", heads=G)

    def sums(place, partial, tiles):
        weights, _, dx, _ = maths.gradients(options, tiles, place, partial)
        return maths.product(dx, tiles.q[...], 1, 0), maths.product(weights, tiles.do[...], 1, 0)

    index = lambda at: (at.b, lax.div(at.n, G), at.column, 0)
    return calls.call(
        _sum(sums),
        walk,
        options,
        tiles,
        out_like=[tiles.k, tiles.v],
        out_specs=[calls.spec(walk, (bk, size), index) for size in (H, V)],
        scratch=[(bk, H), (bk, V)],
        products=4,
        interpret=interpret,
        name="flash_attention_dkv",
    )


def biases(options: maths.Options, tiles: maths.Tiles, states, *, interpret) -> jax.Array:
    """The gradient of tiles.bias.array."""
    B, N = tiles.q.shape[:2]
    bias = tiles.bias
    of_all_batches, of_all_heads, *axes = (not wide for wide in bias.wide)
    over = {(0, 0): "tile", (1, 0): "column", (0, 1): "row", (1, 1): "all"}[tuple(axes)]
    summed = dict(batches=B if of_all_batches else 1, heads=N if of_all_heads else 1)
    walk = walks.walk(states, B=B, N=N, over=over, **summed)

    def sums(place, partial, tiles):
        return (bias.total(maths.gradients(options, tiles, place, partial)[1]),)

    [dbias] = calls.call(
        _sum(sums),
        walk,
        options,
        tiles,
        out_like=[bias.array],
        out_specs=[calls.sheet_spec(walk, options, bias)],
        scratch=[bias.part(*options.blocks)],
        products=2,
        interpret=interpret,
        name="flash_attention_dbias",
    )
    return dbias


def factors(options: maths.Options, tiles: maths.Tiles, states, *, interpret):
    """The gradients of the arrays of tiles.factors."""
    B, N = tiles.q.shape[:2]
    walk = walks.walk(states, B=B, N=N, over="all")

    def sums(place, partial, tiles):
        *_, dfactors = maths.gradients(options, tiles, place, partial)
        return [x.total(dx) for x, dx in zip(tiles.factors, dfactors, strict=True)]

    return calls.call(
        _sum(sums),
        walk,
        options,
        tiles,
        out_like=[x.array for x in tiles.factors],
        out_specs=[calls.sheet_spec(walk, options, x) for x in tiles.factors],
        scratch=[x.part(*options.blocks) for x in tiles.factors],
        products=2,
        interpret=interpret,
        name="flash_attention_dfactors",
    )


def _sum(sums, finish=lambda x: x):
    """A kernel that adds up `sums(place, partial, tiles)` and writes what `finish` makes of it."""

    def kernel(walk, place, tiles, *refs):
        outputs, totals = refs[: len(refs) // 2], refs[len(refs) // 2 :]

        @pl.when(place.first)
        def _():
            for total in totals:
                total[...] = jnp.zeros_like(total)

        def add(partial):
            for total, x in zip(totals, sums(place, partial, tiles), strict=True):
                total[...] += x

        walk.on_tile(place.state, add)

        @pl.when(place.last)
        def _():
            for output, total in zip(outputs, totals, strict=True):
                output[...] = finish(total[...]).astype(output.dtype)

    return kernel
