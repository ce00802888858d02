"""One launch for every kernel of attention on Hopper: who fetches, who computes, what is shared.

A block of threads keeps a tile: rows of 64 for each of two warpgroups that compute. The third
warpgroup only fetches: step by step, into a ring of stages in shared memory, what the tile's list
names. Barriers say that a stage is there, and that it is free again. Source of this division of
work: Shah et al., "FlashAttention-3", section 3.1; of its form in Pallas, the attention of JAX's
own `jax.experimental.pallas.ops.gpu`.
"""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.mosaic_gpu import work
from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import GROUPS, ROWS, TILE, Steps
from pallas_kernels.flash_attention.mosaic_gpu.walk import Walk

_COMPUTING, _FETCHING = 240, 24  # registers of a thread: 65536 are shared by 384


def call(
    compute: Callable,
    walk: Walk,
    steps: Steps,
    inputs: work.Inputs,
    *,
    out_like: list,
    scratch: list[tuple],
    products: int,
    interpret,
    name: str,
) -> tuple[jax.Array, ...]:
    """Runs `compute(work, *outputs)` for ROWS rows at a time of what is kept.

    out_like have the shapes and dtypes of outputs.
    scratch are what each row has of shared memory: numbers (None is one) and their dtype.
    products is how many products with a tile of scores the kernel makes; for the cost.
    """
    leaves, tree = jax.tree.flatten((walk.tables, inputs))
    B, L, heads, _ = inputs.kept[0].shape

    def kernel(*refs):
        refs, outputs, shared = refs[: len(leaves)], refs[len(leaves) : -1], refs[-1]
        tables, inputs = tree.unflatten(refs)
        at = (lax.axis_index(axis) for axis in ("batch", "head", "tile", "group"))
        mine = work.Work(walk, tables, steps, inputs, shared, *at)

        @pl.when(mine.group < GROUPS)
        def _():
            plgpu.set_max_registers(_COMPUTING, action="increase")
            mine.keep()
            compute(mine, *outputs)

        @pl.when(mine.group == GROUPS)
        def _():
            plgpu.set_max_registers(_FETCHING, action="decrease")
            mine.fetch()

    kernel.__name__ = name
    run = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out_like],
        scratch_types=[_shared(steps, inputs, scratch)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(B, heads, L // TILE),
        grid_names=("batch", "head", "tile"),
        num_threads=GROUPS + 1,
        thread_name="group",
        interpret=interpret,
        **_cost(inputs, walk, products),
    )
    # outputs vary over the axes of a mesh that what is kept varies over
    axes = tuple(jax.typeof(inputs.kept[0]).mat.varying)
    return tuple(lax.pcast(x, axes, to="varying") for x in run(*leaves))


def _shared(steps, inputs, scratch):
    """The types of `work.Shared`."""
    count, size = steps.stages, steps.size

    def memory(rows, width, dtype):
        if width is None:
            return plgpu.SMEM(rows, dtype)
        # both matrices of a product must be laid out alike, and one is as wide as a step
        swizzle = min(128, size * jnp.dtype(dtype).itemsize)
        tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
        return plgpu.SMEM(
            (*rows, width), dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle))
        )

    of_stage = lambda x: memory((count, size), x.shape[-1] if x.ndim == 4 else None, x.dtype)
    return work.Shared(
        kept=tuple(memory((GROUPS, ROWS), x.shape[-1], x.dtype) for x in inputs.kept),
        ring=jax.tree.map(of_stage, inputs.fetched),
        scratch=tuple(memory((GROUPS, ROWS), *x) for x in scratch),
        arrived=plgpu.Barrier(num_arrivals=len(inputs.kept), num_barriers=GROUPS),
        ready=tuple(plgpu.Barrier(num_arrivals=len(x), num_barriers=count) for x in inputs.fetched),
        free=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=count),
    )


def _cost(inputs, walk, products):
    """What XLA can't see inside the kernel, of all tiles that lists can hold; for jax >= 0.12."""
    if "cost_estimate" not in inspect.signature(plgpu.kernel).parameters:
        return {}
    (B, L, heads, _), lists = inputs.kept[0].shape, walk.tables[0].shape
    M = max(x.shape[1] for part in inputs.fetched for x in part if x.ndim == 4)
    others = max(x.shape[2] for part in inputs.fetched for x in part if x.ndim == 4)
    entries = B * max(heads, others) * L * min(M, lists[-1] * TILE)
    width = sum(x.shape[-1] for part in inputs.fetched for x in part if x.ndim == 4)
    cost = pl.CostEstimate(
        flops=products * width * entries,
        transcendentals=entries,
        bytes_accessed=2 * width * (entries // TILE + B * heads * L),
    )
    return dict(cost_estimate=cost)
