"""One launch for every kernel of the selective scan on Hopper, and what a block shares."""

import inspect
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.selective_scan.mosaic_gpu.layout import CHANNELS, GROUP, STEP, Cut
from pallas_kernels.selective_scan.mosaic_gpu.walk import STAGES, Block

_SCRATCH = 8192  # bytes, by which sums over channels of a group's tokens cross the warps at once


def call(
    kernel: Callable,
    cut: Cut,
    inputs: dict,
    outputs: dict,
    *,
    fetched: tuple,
    sent: tuple,
    scratch: dict,
    passes: int,
    interpret,
    name: str,
) -> dict:
    """{name: array} of the outputs, after `kernel(block)` by every block of threads.

    Args:
      inputs, outputs: arrays, and shapes and dtypes, in global memory.
      fetched, sent: names of those that go through shared memory, step by step.
      scratch: {name: shape}, more of shared memory, in float32.
      passes: how often it does what the recurrence does with a token; for the cost.
    """
    arrays = inputs | outputs
    B, _, N, _ = inputs["x"].shape

    def body(*refs):
        names = dict(zip(arrays, refs[:-1], strict=True))
        at = (lax.axis_index(axis) for axis in ("sequence", "head", "channels", "entries"))
        kernel(Block(cut, types.SimpleNamespace(**names), *refs[-1], *at))

    body.__name__ = name
    more = dict(reduction_scratch_bytes=_SCRATCH)  # jax >= 0.12
    more = more if hasattr(plgpu.CompilerParams, *more) else {}
    run = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()],
        scratch_types=[_shared(cut, arrays, fetched, sent, scratch)],
        # a thread reads nothing of what another wrote but by barriers of its own: see `walk`
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, **more
        ),
        grid=(B, N, cut.H // CHANNELS, cut.parts),
        grid_names=("sequence", "head", "channels", "entries"),
        interpret=interpret,
        **_cost(cut, arrays, passes),
    )
    # outputs vary over the axes of a mesh that tokens vary over
    axes = tuple(jax.typeof(inputs["x"]).mat.varying)
    out = (lax.pcast(x, axes, to="varying") for x in run(*inputs.values()))
    return dict(zip(outputs, out, strict=True))


def _shared(cut, arrays, fetched, sent, scratch):
    """Shared memory of a block, as `Block` has it, and the barrier of each stage."""
    wide = dict.fromkeys(("b", "c"), (STEP, cut.E)) | dict(states=(CHANNELS, cut.E))
    wide |= dict.fromkeys(("db", "dc"), (STEP // GROUP, GROUP * cut.E))

    def memory(count, name):
        shape = wide.get(name, (STEP, CHANNELS))
        return plgpu.SMEM((count, *shape), arrays[name].dtype)

    scratch = dict(matrix=(CHANNELS, cut.E), row=(CHANNELS,)) | scratch
    return (
        {name: memory(STAGES, name) for name in fetched},
        {name: memory(2, name) for name in sent},
        {name: plgpu.SMEM(shape, jnp.float32) for name, shape in scratch.items()},
        plgpu.Barrier(num_arrivals=len(fetched), num_barriers=STAGES),
    )


def _cost(cut, arrays, passes):
    """What XLA can't see inside the kernel; for jax >= 0.12."""
    if "cost_estimate" not in inspect.signature(plgpu.kernel).parameters:
        return {}
    count = arrays["x"].size * cut.M
    cost = pl.CostEstimate(
        flops=6 * passes * count,
        transcendentals=(1 if passes == 1 else 3) * count,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays.values()),
    )
    return dict(cost_estimate=cost)
