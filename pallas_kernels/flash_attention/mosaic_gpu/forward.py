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
from pallas_kernels.flash_attention.mosaic_gpu import part as parts
from pallas_kernels.flash_attention.mosaic_gpu import tile as maths
from pallas_kernels.flash_attention.mosaic_gpu import tile_sizes
from pallas_kernels.flash_attention.mosaic_gpu.frame import Frame
from pallas_kernels.flash_attention.mosaic_gpu.part import Part
from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import ROWS, TILE
from pallas_kernels.flash_attention.mosaic_gpu.work import Inputs, Work

_MOST = 128  # columns of a product that registers hold beside the sums
_MOST_BESIDE_WIDE = 32  # those of scores, where sums are of more: with 64 registers spill


class Others(NamedTuple):
    """What stays in global memory."""

    asked: maths.Asked
    sinks: Any


def attend(options: maths.Options, q, k, v, asked: maths.Asked, sinks, walk, *, bias=(), interpret):
    """(output (B T N V), lse (B N T) in float32), of whole tiles.

    walk(over, tile, step) is what to walk along; bias is {"bias": that of each score}, or nothing.
    """
    (B, T, N, H), V = q.shape, v.shape[-1]
    o = Part(jax.ShapeDtypeStruct((B, T, N, V), v.dtype), (0,))
    lse = Part(jax.ShapeDtypeStruct((B, N, T), jnp.float32), (0,))
    own = {} if V == H else {"o": o}  # the output leaves by way of the queries' memory if it fits
    return calls.call(
        functools.partial(_kernel, options),
        functools.partial(Frame, "row", (B, N), (B, N), (T // TILE, k.shape[1] // TILE)),
        functools.partial(walk, over="row", tile=TILE),
        Inputs(
            kept=parts.along(0, q=q),
            fetched=(parts.along(1, k=k) | dict(bias), parts.summed(v=v) or parts.along(1, v=v)),
            others=Others(asked, sinks),
        ),
        outputs=[o, lse],
        scratch={"weights": parts.scores(v.dtype), "lse": lse} | own,
        most=tile_sizes.columns(_MOST if V <= _MOST else _MOST_BESIDE_WIDE, q, k, v),
        products=2,
        interpret=interpret,
        name="flash_attention",
    )


def _kernel(options, work: Work, o, lse):
    others, weights_ref = work.inputs.others, work.scratch("weights")
    V = o.array.shape[-1]
    slices = [pl.ds(i, min(_MOST, V - i)) for i in range(0, V, _MOST)]

    def add(carry, step, partial):
        sums, peak, total = carry
        tile = maths.Tile(options, others.asked, step, partial=partial)
        y = tile.scores(step.ready(0))
        higher = jnp.maximum(peak, y.max(1))
        shift = jnp.where(higher == -jnp.inf, 0.0, higher)  # -inf - -inf is NaN
        weights, decay = jnp.exp2(y - maths.along(shift, y.shape, 0)), jnp.exp2(peak - shift)
        total = total * decay + weights.sum(1)
        weights_ref[...] = maths.factor(tile.dropping(y.shape)(weights), weights_ref.dtype)
        plgpu.commit_smem()
        v = parts.to_sum("v", step.ready(1))
        sums = tuple(
            x * maths.along(decay, x.shape, 0) + maths.product(weights_ref, v.at[:, part])
            for x, part in zip(sums, slices, strict=True)
        )
        return sums, higher, total

    sums, peak, total = work.each(add, _begin(work, others.sinks, slices))
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    staged = work.scratch("o") if "o" in work.shared.scratch else work.kept["q"]
    for x, part in zip(sums, slices, strict=True):
        staged.at[:, part][...] = (x / maths.along(total, x.shape, 0)).astype(staged.dtype)
    work.scratch("lse")[...] = jnp.where(seen, (peak + jnp.log2(total)) / maths.LOG2E, -jnp.inf)
    work.write((staged, o), (work.scratch("lse"), lse))


def _begin(work, sinks, slices):
    """Sums, peak and total before the first step; a sink has a logit and no value."""
    full = lambda x, *size: jnp.full((ROWS, *size), x, jnp.float32)
    sums = tuple(full(0, part.size) for part in slices)
    if sinks is None:
        return sums, full(-jnp.inf), full(0)
    return sums, full(sinks[work.place.n] * maths.LOG2E), full(1)
