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
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.mosaic_gpu import tile_sizes, work
from pallas_kernels.flash_attention.mosaic_gpu.frame import Frame
from pallas_kernels.flash_attention.mosaic_gpu.part import Part
from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import GROUPS, TILE
from pallas_kernels.flash_attention.mosaic_gpu.walk import Walk

_COMPUTING, _FETCHING = 240, 24  # registers of a thread: 65536 are shared by 384


def call(
    compute: Callable,
    frame: Callable[..., Frame],
    walk: Callable[..., Walk],
    inputs: work.Inputs,
    *,
    outputs: list[Part],
    scratch: dict[str, Part],
    most: int,
    products: int,
    interpret,
    name: str,
) -> tuple[jax.Array, ...]:
    """Runs `compute(work, *outputs)` for ROWS rows at a time of what is kept.

    Args:
      frame, walk: those of steps of a size, `step`.
      outputs: of shapes and dtypes.
      scratch: what each warpgroup has of shared memory for itself.
      most: columns of a step that registers have room for.
      products: how many products with a tile of scores the kernel makes; for the cost.
    """
    stage = [x for parts in inputs.fetched for x in parts.values()]
    sums = lambda parts: lambda size: sum(x.bytes(size) for x in parts)
    held = [*inputs.kept.values(), *scratch.values()]
    steps = tile_sizes.steps(sums(held), sums(stage), most=most)
    frame, walk = frame(step=steps.size), walk(step=steps.size)
    leaves, tree = jax.tree.flatten((walk.tables, inputs))
    _, results = jax.tree.flatten(outputs)

    def kernel(*refs):
        tables, inputs = tree.unflatten(refs[: len(leaves)])
        block = tuple(lax.axis_index(axis) for axis in ("batch", "head", "tile"))
        mine = work.Work(
            frame, walk, tables, steps, inputs, refs[-1], block, lax.axis_index("group")
        )

        @pl.when(mine.group < GROUPS)
        def _():
            plgpu.set_max_registers(_COMPUTING, action="increase")
            mine.keep()
            compute(mine, *results.unflatten(refs[len(leaves) : -1]))

        @pl.when(mine.group == GROUPS)
        def _():
            plgpu.set_max_registers(_FETCHING, action="decrease")
            mine.fetch()

    kernel.__name__ = name
    run = plgpu.kernel(
        kernel,
        out_type=[x.array for x in outputs],
        scratch_types=[_shared(steps, inputs, scratch)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=frame.grid,
        grid_names=("batch", "head", "tile"),
        num_threads=GROUPS + 1,
        thread_name="group",
        interpret=interpret,
        **_cost(inputs, steps, frame.scores(walk.most), products),
    )
    # outputs vary over the axes of a mesh that inputs vary over
    axes = tuple(jax.typeof(next(iter(inputs.kept.values())).array).mat.varying)
    return tuple(lax.pcast(x, axes, to="varying") for x in run(*leaves))


def _shared(steps, inputs, scratch):
    """The types of `work.Shared`."""
    size, count = steps
    each = lambda parts, *lead: {name: x.memory(size, *lead) for name, x in parts.items()}
    copies = [sum(x.copies for x in parts.values()) for parts in inputs.fetched]
    return work.Shared(
        kept=each(inputs.kept),
        ring=tuple(each(parts, count) for parts in inputs.fetched),
        scratch=each(scratch),
        arrived=plgpu.Barrier(num_arrivals=len(inputs.kept), num_barriers=GROUPS),
        ready=tuple(plgpu.Barrier(num_arrivals=n, num_barriers=count) for n in copies),
        free=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=count),
    )


def _cost(inputs, steps, scores, products):
    """What XLA can't see inside the kernel, of all tiles that lists can hold; for jax >= 0.12."""
    if "cost_estimate" not in inspect.signature(plgpu.kernel).parameters:
        return {}
    fetched = [x for parts in inputs.fetched for x in parts.values()]
    factors = [x for x in (*fetched, *inputs.kept.values()) if x.is_factor]
    width = sum(x.array.shape[3] for x in factors) // len(factors)
    step = sum(x.bytes(steps.size) for x in fetched)
    cost = pl.CostEstimate(
        flops=2 * products * width * scores,
        transcendentals=scores,
        bytes_accessed=step * scores // (TILE * steps.size),
    )
    return dict(cost_estimate=cost)
