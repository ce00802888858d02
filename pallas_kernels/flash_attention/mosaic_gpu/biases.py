"""The kernel of the gradient of a bias, which is that of scores, summed where the bias is shared.

A bias of each score has a block of threads for each step of its tiles, which adds up the batch
entries and heads that share it. One of each query or key is a sum over a row or a column of tiles;
what then shares it, no more than there are queries or keys, is summed outside.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.mosaic_gpu import call as calls
from pallas_kernels.flash_attention.mosaic_gpu import gradients
from pallas_kernels.flash_attention.mosaic_gpu import part as parts
from pallas_kernels.flash_attention.mosaic_gpu import tile as maths
from pallas_kernels.flash_attention.mosaic_gpu import walk as walks
from pallas_kernels.flash_attention.mosaic_gpu.frame import Frame
from pallas_kernels.flash_attention.mosaic_gpu.part import Part
from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import ROWS, TILE
from pallas_kernels.flash_attention.mosaic_gpu.work import Inputs, Work

_MOST = 64  # columns that registers hold three times


def of_scores(options: maths.Options, q, k, v, do, lse, delta, asked, states, *, bias, interpret):
    """The gradient of a bias of each score; arguments are those of `backward.queries`."""
    counts, like = (q.shape[0], q.shape[2]), bias["bias"].array
    first = parts.along(0, q=q, lse=lse) | parts.along(1, k=k)
    second = parts.along(0, do=do, delta=delta) | parts.along(1, v=v)
    [dbias] = calls.call(
        functools.partial(_biases, options, 0),
        functools.partial(Frame, "tile", counts, like.shape[:2], states.shape[2:]),
        lambda step: walks.members(states, counts, like.shape[:2]),
        Inputs(kept=bias, fetched=(first, second), others=asked),
        outputs=[Part(jax.ShapeDtypeStruct(like.shape, like.dtype), (0, 1))],
        scratch={},
        most=_MOST,
        products=2,
        interpret=interpret,
        name="flash_attention_dbias",
    )
    return dbias


def along(options: maths.Options, q, k, v, do, lse, delta, asked, states, *, over, interpret):
    """The gradient (B N L) in float32 of a bias of each query (over "row") or key ("column")."""
    (B, T, N, _), S, queries = q.shape, k.shape[1], int(over == "column")
    by_query = dict(q=q, lse=lse), dict(do=do, delta=delta)
    by_key = dict(k=k), dict(v=v)
    kept, fetched = (by_key, by_query) if queries else (by_query, by_key)
    rows, columns = (S, T) if queries else (T, S)
    sums = Part(jax.ShapeDtypeStruct((B, N, rows), jnp.float32), (0,))
    [dbias] = calls.call(
        functools.partial(_biases, options, queries),
        functools.partial(Frame, over, (B, N), (B, N), (rows // TILE, columns // TILE)),
        functools.partial(walks.walk, states, over=over, tile=TILE),
        Inputs(
            kept=parts.along(0, **kept[0], **kept[1]),
            fetched=tuple(parts.along(1, **x) for x in fetched),
            others=asked,
        ),
        outputs=[sums],
        scratch={"sums": sums},
        most=_MOST,
        products=2,
        interpret=interpret,
        name="flash_attention_dbias",
    )
    return dbias


def _biases(options, queries, work: Work, dbias):
    whole = "bias" in work.kept

    def add(total, step, partial):
        tile = maths.Tile(options, work.inputs.others, step, queries, partial)
        slopes, p = gradients.weights(tile, step.ready(0))
        dz = gradients.dscores(tile, step.ready(1), p, tile.dropping(p.shape))
        dy = slopes.of_score(dz)
        return total + (dy if whole else dy.sum(1))

    shape = (ROWS, work.steps.size) if whole else (ROWS,)
    total = work.each(add, jnp.zeros(shape, jnp.float32))
    staged = work.kept["bias"] if whole else work.scratch("sums")
    staged[...] = total.astype(staged.dtype)
    work.write((staged, dbias))
