"""The forward kernel: an online softmax over the key tiles that a query tile sees.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax"; Dao,
"FlashAttention-2", algorithm 1; Shah et al., "FlashAttention-3", algorithm 1.

Unlike the last: weights go through shared memory to the second product rather than from registers,
and nothing but chance lets one warpgroup's softmax run under the other's products.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.mosaic_gpu import call as calls
from pallas_kernels.flash_attention.mosaic_gpu import tile as maths
from pallas_kernels.flash_attention.mosaic_gpu import tile_sizes
from pallas_kernels.flash_attention.mosaic_gpu import walk as walks
from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import ROWS, TILE
from pallas_kernels.flash_attention.mosaic_gpu.work import Inputs, Work

_MOST = 128  # columns of a product that registers hold beside the sums
_MOST_BESIDE_WIDE = 32  # those of scores, where sums are of more: with 64 registers spill


class Others(NamedTuple):
    """What stays in global memory."""

    asked: maths.Asked
    sinks: Any


def attend(options: maths.Options, q, k, v, asked: maths.Asked, sinks, states, *, interpret):
    """(output (B T N V), lse (B N T) in float32), of whole tiles."""
    (B, T, N, H), V = q.shape, v.shape[-1]
    own = () if V == H else (V,)  # the output leaves by way of the queries' memory if it fits
    most = _MOST if V <= _MOST else _MOST_BESIDE_WIDE
    steps = tile_sizes.steps(H + sum(own), H + V, scores=1, most=most)
    walk = walks.walk(states, over="row", tile=TILE, step=steps.size)
    return calls.call(
        functools.partial(_kernel, options),
        walk,
        steps,
        Inputs(kept=(q,), fetched=((k,), (v,)), others=Others(asked, sinks)),
        out_like=[
            jax.ShapeDtypeStruct((B, T, N, V), v.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ],
        scratch=[(steps.size, v.dtype), (None, jnp.float32), *((V, v.dtype) for V in own)],
        products=2,
        interpret=interpret,
        name="flash_attention",
    )


def _kernel(options, work: Work, o_ref, lse_ref):
    others, weights_ref = work.inputs.others, work.scratch(0)
    V = o_ref.shape[-1]
    parts = [pl.ds(i, min(_MOST, V - i)) for i in range(0, V, _MOST)]

    def add(carry, step, partial):
        sums, peak, total = carry
        (k,) = step.ready(0)
        _, y = maths.scores(options, maths.product(work.kept(0), k.T))
        if partial:
            y = maths.masked(options, others.asked, work, step, "row", y)
        higher = jnp.maximum(peak, y.max(1))
        shift = jnp.where(higher == -jnp.inf, 0.0, higher)  # -inf - -inf is NaN
        weights, decay = jnp.exp2(y - maths.along(shift, y.shape, 0)), jnp.exp2(peak - shift)
        total = total * decay + weights.sum(1)
        weights_ref[...] = weights.astype(weights_ref.dtype)
        plgpu.commit_smem()
        (v,) = step.ready(1)
        sums = tuple(
            x * maths.along(decay, x.shape, 0) + maths.product(weights_ref, v.at[:, part])
            for x, part in zip(sums, parts, strict=True)
        )
        return sums, higher, total

    sums, peak, total = work.each(add, _begin(work, others.sinks, parts))
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    staged = work.scratch(2) if len(work.shared.scratch) > 2 else work.kept(0)
    for x, part in zip(sums, parts, strict=True):
        staged.at[:, part][...] = (x / maths.along(total, x.shape, 0)).astype(o_ref.dtype)
    work.scratch(1)[...] = jnp.where(seen, (peak + jnp.log2(total)) / maths.LOG2E, -jnp.inf)
    work.write((staged, o_ref), (work.scratch(1), lse_ref))


def _begin(work, sinks, parts):
    """Sums, peak and total before the first step; a sink has a logit and no value."""
    full = lambda x, *size: jnp.full((ROWS, *size), x, jnp.float32)
    sums = tuple(full(0, part.size) for part in parts)
    if sinks is None:
        return sums, full(-jnp.inf), full(0)
    return sums, full(sinks[work.head] * maths.LOG2E), full(1)
