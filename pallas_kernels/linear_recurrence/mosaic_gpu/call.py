"""One launch for both kernels: who has which rows of a state, and what shared memory there is.

A block of threads is one warpgroup, which has 64 of a head's value features. Blocks of the same
head fetch the same matrices but for v, each for itself.
"""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_recurrence.mosaic_gpu.pieces import Pieces
from pallas_kernels.linear_recurrence.mosaic_gpu.walk import STAGES, Shared, Walk

_ROWS = 64  # of which wgmma multiplies multiples
_SWIZZLE = 128  # bytes that wgmma's matrices are laid out by


def call(
    step: Callable,
    pieces: Pieces,
    state: jax.Array,
    outputs: list[jax.ShapeDtypeStruct],
    *,
    reverse: bool,
    interpret,
    name: str,
) -> tuple[jax.Array, ...]:
    """(last state, *outputs) of `state = step(chunk, state, *outputs)`, for all chunks of a head.

    pieces (chunks ...), of all heads in turn, and state (heads V H) are as of `chain`; of outputs
    (chunks V ...) a step puts out the chunk's part. Chunks are walked from the last if `reverse`.
    """
    leaves, tree = jax.tree.flatten(pieces)
    heads, V, _ = state.shape
    length = len(pieces.kept) // heads

    def kernel(first, *refs):
        inputs, (last, *outputs), shared = refs[: len(leaves)], refs[len(leaves) : -1], refs[-1]
        head, rows = lax.axis_index("head"), pl.ds(lax.axis_index("part") * _ROWS, _ROWS)
        number = lambda i: head * length + (length - 1 - i if reverse else i)
        walk = Walk(tree.unflatten(inputs), shared, number, rows, length)
        walk.run(
            lambda chunk, state: step(chunk, state, *outputs),
            first.at[head, rows],
            last.at[head, rows],
            copies=len(outputs),
        )

    kernel.__name__ = name
    run = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(state.shape, state.dtype), *outputs],
        scratch_types=[_shared(pieces, state)],
        grid=(heads, V // _ROWS),
        grid_names=("head", "part"),
        interpret=interpret,
        **_cost(pieces, state, outputs),
    )
    # outputs vary over the axes of a mesh that inputs vary over
    axes = tuple(jax.typeof(state).mat.varying)
    return tuple(lax.pcast(x, axes, to="varying") for x in run(state, *leaves))


def _shared(pieces, state):
    """The types of `Shared`."""
    C, H, dtype = pieces.v.shape[2], state.shape[2], pieces.v.dtype
    of_stage = lambda x: _matrix((STAGES, *x.shape[1:]), x.dtype)
    ring = jax.tree.map(of_stage, pieces._replace(v=pieces.v[:, :_ROWS], kept=None))
    return Shared(
        ring=ring._replace(kept=plgpu.SMEM((STAGES, H), jnp.float32)),
        state=_matrix((_ROWS, H), state.dtype),
        now=_matrix((_ROWS, H), dtype),
        u=_matrix((_ROWS, C), dtype),
        o=_matrix((_ROWS, C), dtype),
        ready=plgpu.Barrier(num_arrivals=len(jax.tree.leaves(pieces)), num_barriers=STAGES),
        arrived=plgpu.Barrier(),
    )


def _matrix(shape, dtype):
    """Shared memory laid out for wgmma."""
    columns = _SWIZZLE // jnp.dtype(dtype).itemsize
    transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(_SWIZZLE)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _cost(pieces, state, outputs):
    """What XLA can't see inside the kernel; for jax >= 0.12."""
    if "cost_estimate" not in inspect.signature(plgpu.kernel).parameters:
        return {}
    matrices = sum(x.shape[1] * x.shape[2] for x in jax.tree.leaves(pieces) if x.ndim == 3)
    arrays = state, state, *outputs, *jax.tree.leaves(pieces)
    cost = pl.CostEstimate(
        flops=2 * len(pieces.kept) * state.shape[1] * (matrices - pieces.v[0].size),
        transcendentals=0,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )
    return dict(cost_estimate=cost)
