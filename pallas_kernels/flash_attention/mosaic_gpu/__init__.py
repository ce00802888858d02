"""Exact softmax attention tile by tile on Hopper GPUs: O(T) memory forward and backward.

The formulas are those of `pallas_kernels.flash_attention`. `walk` says which tiles are visited in
which order, `frame` where that is, `options` what they are told, `tile` is the maths of one and
`gradients` of its gradients, `score_mod` runs one, of the `operations` that there are, `forward`,
`backward`, `biases` and `factors` are the kernels, `sheet` lays out what is read from global memory
for each score, `part` what goes through shared memory, `work` is what a warpgroup does, `call`
launches a kernel, `vjp` ties them together.

Unlike the kernels for TPU, which have a grid with a step for each tile: a block of threads walks
over all tiles of its own row or column, and one of its warpgroups fetches them for the others.
"""

import math

import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import flash_attention as kernels
from pallas_kernels import hopper
from pallas_kernels.flash_attention import vjp as vjps
from pallas_kernels.flash_attention.mosaic_gpu import score_mod as score_mods
from pallas_kernels.flash_attention.mosaic_gpu import vjp
from pallas_kernels.flash_attention.mosaic_gpu.options import Options
from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import TILE, WIDEST, WIDEST_FLOAT32

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
    bias: Float[Array, "#B #N #T #S"] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    dropout: kernels.Dropout | None = None,
    score_mod: kernels.ScoreMod | None = None,
    whole: tuple[Float[Array, "B T N V"], Float[Array, "B T N"]] | None = None,
    interpret=False,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """(o in v's dtype, lse in float32); query head n uses key head n // (N / K).

    Args:
      t, s: positions, for the mask, for dropout and for score_mod.
      mask: what queries see, with states for tiles of TILE queries and keys; a query that sees
        nothing gives zeros, with lse -inf. The tiles that `visible` gets are of the same shape as
        one another, which differs from kernel to kernel; so are those that dropout's `keep` gets.
      bias: of each score takes as much memory again in the backward pass, which reads it by keys.
      score_mod: its function gets tiles as `visible` does; Mosaic must lower what it does, and
        derivatives of that, or `operations` have what stands for it.
      whole: what is returned instead, and has the gradients that these keys have of it
        (`pallas_kernels.flash_attention.whole`).
      interpret: `plgpu.InterpretGPUParams()` runs on a CPU, slowly, and multiplies in float32.

    q, k, v, bias, sinks and factors of score_mod have gradients, of reverse mode; lse may be used.
    Sums are made in float32; the factors of products, weights and gradients of scores too, are
    bfloat16 or float16 as q, k and v are, or for float32 rounded to TF32: to 10 bits after the
    first.

    Raises ValueError for states that don't fit the tiles, NotImplementedError for other dtypes;
    float32 where `jax.default_matmul_precision` forbids TF32; heads that are too wide; too many
    tiles; operations of score_mod that Mosaic can't lower; and GPUs that aren't Hopper, if the
    device of the mesh in use is known to be one, or else the first device of this process.
    """
    check(q, k, v, interpret)
    _check_states(q, k, mask.states)
    known = isinstance(mask.states, np.ndarray)
    options = Options(scale, softcap, mask.visible, k.shape[1])
    seed = None
    if dropout is not None:
        options, seed = options._replace(keep=dropout.keep, rate=dropout.rate), dropout.seed
    factors, numbers = (), ()
    if score_mod is not None:
        score_mods.check(score_mod)
        modify, factors, numbers = score_mod
        options = options._replace(score_mod=modify)
    given = vjps.Given(t, s, mask.arrays, seed, None if known else mask.states, numbers)
    static = vjps.Static(options, mask.states if known else None, interpret)
    learned = vjps.Learned(q, k, v, bias, sinks, factors)
    if whole is not None:
        return vjp.attend_to_part(static, learned, given, whole)
    return vjp.attend(static, learned, given)


def check(q, k, v, interpret=False) -> None:
    """Raises NotImplementedError for dtypes, heads and devices that the kernels aren't for."""
    hopper.check_device(interpret)
    dtype = hopper.check_dtype(q.dtype, k.dtype, v.dtype)
    widest = WIDEST_FLOAT32 if dtype == "float32" else WIDEST
    if (width := max(q.shape[-1], v.shape[-1])) > widest:
        raise NotImplementedError(
            f"the kernel for Hopper has heads of {widest} in {dtype}, not {width}"
        )


def _check_states(q, k, states):
    tiles = -(-q.shape[1] // TILE), -(-k.shape[1] // TILE)
    if states.shape[2:] != tiles:
        raise ValueError(f"states of shape {states.shape} must be for {tiles} tiles of {TILE}")
    if math.prod(states.shape) > MOST_STATES:
        raise NotImplementedError(
            f"states of shape {states.shape} must be {MOST_STATES} or fewer; of larger tiles, or "
            "of fewer batch entries and heads"
        )
