"""Exact softmax attention tile by tile on Hopper GPUs: O(T) memory forward and backward.

The formulas are those of `pallas_kernels.flash_attention`, without bias and dropout. `walk` says
which tiles are visited in which order, `tile` is the maths of one, `forward` and `backward` are the
kernels, `sheet` lays out what masks read, `work` is what a warpgroup does, `call` launches a
kernel, `vjp` ties them together.

Unlike the kernels for TPU, which have a grid with a step for each tile: a block of threads walks
over all tiles of its own row or column, and one of its warpgroups fetches them for the others.
"""

import math

import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import flash_attention as kernels
from pallas_kernels.flash_attention import vjp as vjps
from pallas_kernels.flash_attention.mosaic_gpu import vjp
from pallas_kernels.flash_attention.mosaic_gpu.tile import Options
from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import TILE, WIDEST

MOST_STATES = 2**24  # whose lists take 128 MiB


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    t: Int[Array | np.ndarray, "T"],
    s: Int[Array | np.ndarray, "S"],
    mask: kernels.Mask,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    interpret=False,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """(o in v's dtype, lse in float32); query head n uses key head n // (N / K).

    Args:
      t, s: positions, for the mask.
      mask: what queries see, with states for tiles of TILE queries and keys; a query that sees
        nothing gives zeros, with lse -inf. The tiles that `visible` gets are of the same shape as
        one another, which differs from kernel to kernel.
      interpret: `plgpu.InterpretGPUParams()` runs on a CPU, slowly.

    q, k, v and sinks have gradients, of reverse mode; lse may be used. Sums are made in float32.
    Raises ValueError for states that don't fit the tiles, NotImplementedError for other dtypes than
    bfloat16 or float16, heads that are too wide and too many tiles.
    """
    _check(q, k, v, mask.states)
    known = isinstance(mask.states, np.ndarray)
    options = Options(scale, softcap, mask.visible, k.shape[1])
    given = vjps.Given(t, s, mask.arrays, None, None if known else mask.states)
    static = vjps.Static(options, mask.states if known else None, interpret)
    return vjp.attend(static, vjps.Learned(q, k, v, None, sinks), given)


def _check(q, k, v, states):
    tiles = -(-q.shape[1] // TILE), -(-k.shape[1] // TILE)
    if states.shape[2:] != tiles:
        raise ValueError(f"states of shape {states.shape} must be for {tiles} tiles of {TILE}")
    dtypes = {str(x.dtype) for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        raise NotImplementedError(
            f"the kernel for Hopper multiplies bfloat16 or float16, not {sorted(dtypes)}"
        )
    if (width := max(q.shape[-1], v.shape[-1])) > WIDEST:
        raise NotImplementedError(f"the kernel for Hopper has heads of {WIDEST}, not {width}")
    if math.prod(states.shape) > MOST_STATES:
        raise NotImplementedError(
            f"states of shape {states.shape} must be {MOST_STATES} or fewer; of larger tiles, or "
            "of fewer batch entries and heads"
        )
