"""One `pallas_call` for every kernel of attention: its grid, its blocks and its cost."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention.sheet import Sheet
from pallas_kernels.flash_attention.tile import Options, Tiles
from pallas_kernels.flash_attention.walk import Walk


def call(
    kernel: Callable,
    walk: Walk,
    options: Options,
    tiles: Tiles,
    *,
    out_like: list,
    out_specs: list[pl.BlockSpec],
    scratch: list[tuple[int, int]],
    products: int,
    interpret,
    name: str,
) -> tuple[jax.Array, ...]:
    """Runs `kernel(walk, place, tiles, *outputs, *scratch)`, with references, over the walk.

    out_like have the shapes and dtypes of outputs, which `out_specs` cut.
    scratch are shapes of float32 memory that stays from step to step.
    products is how many products with a tile of scores the kernel makes; for the cost.
    """

    def body(steps, states, *refs):
        ids = [pl.program_id(axis) for axis in range(4)]
        kernel(walk, walk.at(ids, (steps, states)), *refs)

    mat = jax.typeof(tiles.q).mat  # outputs vary over the axes of a mesh that queries vary over
    run = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(walk.tables),
            grid=walk.grid,
            in_specs=[_specs(walk, options, tiles)],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=mat) for x in out_like],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=options.sizes.vmem,
        ),
        cost_estimate=_cost(walk, options, tiles, products),
        interpret=interpret,
        name=name,
    )
    return tuple(run(*walk.tables, tiles))


def spec(walk: Walk, block: tuple[int, int], index: Callable) -> pl.BlockSpec:
    """Blocks of an array with four axes: `index(place)` is the block of a place."""
    return pl.BlockSpec((None, None, *block), lambda *args: index(walk.at(args[:4], args[4:])))


def sheet_spec(walk: Walk, options: Options, sheet: Sheet) -> pl.BlockSpec:
    """Blocks of a sheet."""
    return spec(walk, sheet.part(*options.blocks), sheet.block)


def _specs(walk, options, tiles):
    """The blocks of all that a tile is made of."""
    G = tiles.q.shape[1] // tiles.k.shape[1]
    bq, bk = options.blocks

    def rows(size, index):
        block = lambda x: spec(walk, (size, x.shape[-1]), index)
        return lambda x: None if x is None else block(x)

    by_query = rows(bq, lambda at: (at.b, at.n, at.row, 0))
    by_key = rows(bk, lambda at: (at.b, lax.div(at.n, G), at.column, 0))
    lay = lambda x: dataclasses.replace(x, array=sheet_spec(walk, options, x))
    sheets = lambda tree: jax.tree.map(lay, tree, is_leaf=lambda x: isinstance(x, Sheet))
    scalars = lambda x: None if x is None else pl.BlockSpec(memory_space=pltpu.SMEM)
    return Tiles(
        q=by_query(tiles.q),
        k=by_key(tiles.k),
        v=by_key(tiles.v),
        t=sheets(tiles.t),
        s=sheets(tiles.s),
        arrays=sheets(tiles.arrays),
        bias=sheets(tiles.bias),
        sinks=scalars(tiles.sinks),
        seed=scalars(tiles.seed),
        factors=sheets(tiles.factors),
        numbers=sheets(tiles.numbers),
        do=by_query(tiles.do),
        lse=sheets(tiles.lse),
        delta=sheets(tiles.delta),
    )


def _cost(walk, options, tiles, products):
    """What XLA can't see inside the kernel; heads are about as wide in queries as in values."""
    bq, bk = options.blocks
    entries = walk.tiles * bq * bk
    width = (tiles.q.shape[-1] + tiles.v.shape[-1]) / 2
    bits = tiles.k.dtype.itemsize
    rows = sum(math.prod(x.shape) for x in (tiles.q, tiles.do) if x is not None)
    return pl.CostEstimate(
        flops=int(2 * products * width * entries),
        transcendentals=entries,
        bytes_accessed=int(bits * (2 * rows + 2 * width * entries / bq)),
    )
