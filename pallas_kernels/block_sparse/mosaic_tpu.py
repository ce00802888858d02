"""Pallas kernels for TPU: the online softmax, and the gradients as sums over the same pairs.

    forward    o_t, lse_t of each query of a tile, over the blocks of the tile
    queries    dq_t = sum_s dx_ts k_s,      likewise
    keys       dk_s = sum_t dx_ts q_t,  dv_s = sum_t p_ts do_t,      over the tiles of a block

p = exp(x - lse), dx = scale p (do . v - delta). Each sum has one accumulator and a fixed order, so
results are the same each time. Source: Milakov and Gimelshein, "Online normalizer calculation for
softmax"; Dao, "FlashAttention-2", algorithms 1 and 2.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse import tile as maths
from pallas_kernels.block_sparse import walk as walks
from pallas_kernels.flash_attention.tile import product


def forward(options: maths.Options, tiles: maths.Tiles, pairs, *, dtype, interpret):
    """(o (U M X V) in dtype, lse (U M 1 X) in float32); 0 and -inf for a query that sees nothing.

    Tiles that are in no pair are not written.
    """
    (U, M, X, _), V = tiles.q.shape, tiles.v.shape[-1]
    o, lse = (jax.ShapeDtypeStruct((U, M, *x), y) for x, y in (((X, V), dtype), ((1, X), "f4")))
    scratch = [(V, X), (1, X), (1, X)]
    call = functools.partial(_call, "block_sparse", _attend, options, over="queries", products=2)
    return call(tiles, pairs, outputs=(o, lse), scratch=scratch, interpret=interpret)


def queries(options: maths.Options, tiles: maths.Tiles, pairs, *, dtype, interpret):
    """The gradient (U M X H) of tiles.q in dtype. Tiles that are in no pair are not written."""

    def sums(place, tiles):
        _, dx = maths.gradients(options, tiles, place)
        return (product(tiles.k[...], dx, 0, 0),)

    X, H = tiles.q.shape[2:]
    kernel = functools.partial(_sum, sums, jnp.transpose)
    call = functools.partial(_call, "block_sparse_dq", kernel, options, over="queries", products=3)
    out = jax.ShapeDtypeStruct(tiles.q.shape, dtype)
    return call(tiles, pairs, outputs=(out,), scratch=[(H, X)], interpret=interpret)[0]


def keys(options: maths.Options, tiles: maths.Tiles, pairs, *, interpret):
    """The gradients of tiles.k and tiles.v. Blocks that are in no pair are not written."""

    def sums(place, tiles):
        weights, dx = maths.gradients(options, tiles, place)
        return product(dx, tiles.q[...], 1, 0), product(weights, tiles.do[...], 1, 0)

    kernel = functools.partial(_sum, sums, lambda x: x)
    call = functools.partial(_call, "block_sparse_dkv", kernel, options, over="keys", products=4)
    scratch = [x.shape[2:] for x in (tiles.k, tiles.v)]
    outputs = tiles.k, tiles.v
    return call(tiles, pairs, outputs=outputs, scratch=scratch, interpret=interpret)


def _attend(options, place, tiles, o_ref, lse_ref, sum_ref, peak_ref, total_ref):
    @pl.when(place.first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        peak_ref[...] = jnp.full_like(peak_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)

    x, peak = maths.scores(options, tiles, place), peak_ref[...]
    higher = jnp.maximum(peak, x.max(0, keepdims=True))
    shift = jnp.where(higher == -jnp.inf, 0.0, higher)  # -inf - -inf is NaN
    weights, decay = jnp.exp(x - shift), jnp.exp(peak - shift)
    peak_ref[...] = higher
    total_ref[...] = total_ref[...] * decay + weights.sum(0, keepdims=True)
    sum_ref[...] = sum_ref[...] * decay + product(tiles.v[...], weights, 0, 0)

    @pl.when(place.last)
    def _():
        total = total_ref[...]
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        o_ref[...] = (sum_ref[...] / total).T.astype(o_ref.dtype)
        lse_ref[...] = jnp.where(seen, peak_ref[...] + jnp.log(total), -jnp.inf)


def _sum(sums, finish, options, place, tiles, *refs):
    """Adds up `sums(place, tiles)` and writes what `finish` makes of it."""
    outputs, totals = refs[: len(refs) // 2], refs[len(refs) // 2 :]

    @pl.when(place.first)
    def _():
        for total in totals:
            total[...] = jnp.zeros_like(total)

    for total, x in zip(totals, sums(place, tiles), strict=True):
        total[...] += x

    @pl.when(place.last)
    def _():
        for output, total in zip(outputs, totals, strict=True):
            output[...] = finish(total[...]).astype(output.dtype)


def _call(name, kernel, options, tiles, pairs, *, over, products, outputs, scratch, interpret):
    """Runs `kernel(options, place, tiles, *outputs, *scratch)`, with references, at each step.

    The units together, or where their tables don't fit scalar memory one after the other.
    """
    run = functools.partial(_run, name, kernel, options, over, products, outputs, scratch)
    if pairs.blocks.size <= walks.MOST_PAIRS:
        return run(tiles, pairs, interpret=interpret)
    each = jax.tree.map(lambda x: x[:, None], (tiles, pairs))
    found = lax.map(lambda x: run(*x, interpret=interpret), each)
    return jax.tree.map(lambda x: x[:, 0], found)


def _run(name, kernel, options, over, products, outputs, scratch, tiles, pairs, *, interpret):
    walk = walks.walk(pairs, parts=options.parts, over=over)

    def body(*refs):
        tables, (tiles, *refs) = refs[: len(walk.tables)], refs[len(walk.tables) :]
        place = walk.at([pl.program_id(axis) for axis in range(3)], tables)
        pl.when(place.live)(lambda: kernel(options, place, tiles, *refs))

    U, mat = len(pairs.count), jax.typeof(tiles.q).mat  # outputs vary on a mesh as queries do
    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(walk.tables),
            grid=walk.grid,
            in_specs=[_specs(walk, options, tiles)],
            out_specs=[_spec(walk, options, over, x) for x in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((U, *x.shape[1:]), x.dtype, manual_axis_type=mat) for x in outputs
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(tiles, pairs.blocks.size, options, products),
        interpret=interpret,
        name=name,
    )
    return tuple(call(*walk.tables, tiles))


def _specs(walk, options, tiles):
    """The blocks of all that a tile is made of."""
    by = lambda over, tree: jax.tree.map(functools.partial(_spec, walk, options, over), tree)
    of_keys = dict(k=by("keys", tiles.k), v=by("keys", tiles.v), by_key=by("keys", tiles.by_key))
    return by("queries", tiles)._replace(**of_keys)


def _spec(walk, options, over, x):
    """Tiles of x (U tiles ...), by tile of queries or by part of a block of keys."""

    def index(*args):
        place = walk.at(args[:3], args[3:])
        tile = place.tile if over == "queries" else place.block * options.parts + place.part
        return place.unit, tile, 0, 0

    return pl.BlockSpec((None, None, *x.shape[2:]), index)


def _cost(tiles, pairs, options, products):
    """What XLA can't see inside the kernel, for as many tiles as there may be."""
    (*_, X, H), V, size = tiles.q.shape, tiles.v.shape[-1], tiles.k.dtype.itemsize
    keys = options.parts * tiles.k.shape[2]
    return pl.CostEstimate(
        flops=products * pairs * X * keys * (H + V),
        transcendentals=pairs * X * keys,
        bytes_accessed=size * (H + V) * (pairs * keys + math.prod(tiles.q.shape[:3])),
    )
