"""The kernel of the gradients of a score_mod's factors: sums over all scores of a head.

It sums over a row of tiles, for each query; what is left, no more than there are queries, is summed
outside, in a fixed order too.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.mosaic_gpu import call as calls
from pallas_kernels.flash_attention.mosaic_gpu import gradients
from pallas_kernels.flash_attention.mosaic_gpu import part as parts
from pallas_kernels.flash_attention.mosaic_gpu import tile as maths
from pallas_kernels.flash_attention.mosaic_gpu.frame import Frame
from pallas_kernels.flash_attention.mosaic_gpu.part import Part
from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import ROWS, TILE
from pallas_kernels.flash_attention.mosaic_gpu.work import Inputs, Work


def of_heads(
    options: maths.Options, q, k, v, do, lse, delta, asked, walk, *, bias=(), interpret
) -> tuple[jax.Array, ...]:
    """The gradients (B N 1 1) of factors; arguments are those of `backward.queries`."""
    (B, T, N, _), S = q.shape, k.shape[1]
    sums = [Part(jax.ShapeDtypeStruct((B, N, T), jnp.float32), (0,)) for _ in asked.factors]
    found = calls.call(
        functools.partial(_factors, options),
        functools.partial(Frame, "row", (B, N), (B, N), (T // TILE, S // TILE)),
        functools.partial(walk, over="row", tile=TILE),
        Inputs(
            kept=parts.along(0, q=q, do=do, lse=lse, delta=delta),
            fetched=(parts.along(1, k=k) | dict(bias), parts.along(1, v=v)),
            others=asked,
        ),
        outputs=sums,
        scratch={str(i): x for i, x in enumerate(sums)},
        most=gradients.columns(options),
        products=2,
        interpret=interpret,
        name="flash_attention_dfactors",
    )
    pairs = zip(found, asked.factors, strict=True)
    return tuple(x.sum(-1)[..., None, None].astype(like.array.dtype) for x, like in pairs)


def _factors(options, work: Work, *outputs):
    def add(totals, step, partial):
        tile = maths.Tile(options, work.inputs.others, step, partial=partial)
        slopes, p = gradients.weights(tile, step.ready(0))
        dz = gradients.dscores(tile, step.ready(1), p, tile.dropping(p.shape))
        found = slopes.of_factors(dz)
        return tuple(total + x.sum(1) for total, x in zip(totals, found, strict=True))

    totals = work.each(add, tuple(jnp.zeros(ROWS, jnp.float32) for _ in outputs))
    staged = [work.scratch(str(i)) for i in range(len(outputs))]
    for memory, total in zip(staged, totals, strict=True):
        memory[...] = total
    work.write(*zip(staged, outputs, strict=True))
