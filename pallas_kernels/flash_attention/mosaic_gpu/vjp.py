"""Attention as a function with a gradient, from arrays as they come to whole tiles and back."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import vjp, whole
from pallas_kernels.flash_attention.mosaic_gpu import backward, biases, factors, forward
from pallas_kernels.flash_attention.mosaic_gpu import part as parts
from pallas_kernels.flash_attention.mosaic_gpu import sheet as sheets
from pallas_kernels.flash_attention.mosaic_gpu import walk as walks
from pallas_kernels.flash_attention.mosaic_gpu.part import Part
from pallas_kernels.flash_attention.mosaic_gpu.tile import LOG2E, Asked
from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import TILE

_FEATURES = 64  # that wgmma's matrices are laid out by


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(static: vjp.Static, learned: vjp.Learned, given: vjp.Given):
    """(o (B T N V), lse (B T N))."""
    (_, T, *_), V = learned.q.shape, learned.v.shape[-1]
    sinks = None if learned.sinks is None else learned.sinks.astype(jnp.float32)
    asked, bias = _asked(static, learned, given, "row")
    o, lse = forward.attend(
        static.options,
        *map(_whole, learned[:3]),
        asked,
        sinks,
        functools.partial(walks.walk, vjp.states(static, given)),
        bias=bias,
        interpret=static.interpret,
    )
    return o[:, :T, :, :V], lse[..., :T].swapaxes(1, 2)


def _forward(static, learned, given):
    o, lse = attend(static, learned, given)
    return (o, lse), (learned, given, o, lse)


def _backward(static, residuals, cotangents):
    (learned, given, o, lse), (do, dlse) = residuals, cotangents
    do = parts.factor(do)  # delta's too: what rounding does to the sum over v cancels then
    lse, delta = vjp.of_output(o, lse, do, dlse)
    by_query = lambda x, fill: sheets.pad(x.swapaxes(1, 2), 2, _tiles(lse.shape[1]), fill)
    arrays = map(_whole, (*learned[:3], do))
    arrays = *arrays, by_query(lse * LOG2E, jnp.inf), by_query(delta, 0.0)
    states = vjp.states(static, given)
    walk, options = functools.partial(walks.walk, states), dict(interpret=static.interpret)

    def call(kernel, rows, walk=walk, **more):
        asked, bias = _asked(static, learned, given, rows)
        more |= options | ({"bias": bias} if bias else {})
        return kernel(static.options, *arrays, asked, walk, **more)

    grads = call(backward.queries, "row"), *call(backward.keys_and_values, "column")
    grads = [dx[:, : x.shape[1], :, : x.shape[3]] for dx, x in zip(grads, learned[:3], strict=True)]
    dbias = None
    if learned.bias is not None:
        of_bias = functools.partial(call, walk=states)
        dbias = _of_bias(of_bias, learned.bias, *(x.shape[1] for x in learned[:2]))
    dsinks = None if learned.sinks is None else vjp.of_sinks(learned.sinks, lse, delta)
    dfactors = call(factors.of_heads, "row") if learned.factors else ()
    return vjp.Learned(*grads, dbias, dsinks, dfactors), None


attend.defvjp(_forward, _backward)
attend_to_part = whole.part_of(_backward)


def _tiles(length):
    """The length of whole tiles."""
    return -(-length // TILE) * TILE


def _whole(x):
    """(B L heads F), filled up with zeros to whole tiles and matrices."""
    x = sheets.pad(x, 1, _tiles(x.shape[1]))
    return sheets.pad(x, 3, -(-x.shape[3] // _FEATURES) * _FEATURES)


def _asked(static, learned, given, over):
    """(what a kernel over rows or columns reads from global memory, the bias of each score)."""
    options, sizes = static.options, tuple(_tiles(x.shape[1]) for x in learned[:2])
    lay = lambda x: sheets.lay(x, sizes, over)
    needed = options.visible or options.keep or options.score_mod
    at = lambda x, shape: lay(jnp.asarray(x, jnp.int32).reshape(shape)) if needed else None
    t, s = at(given.t, (1, 1, -1, 1)), at(given.s, (1, 1, 1, -1))
    arrays = tuple(map(lay, given.arrays))
    bias = None if learned.bias is None else lay(learned.bias)
    of_heads = (tuple(map(sheets.of_heads, x)) for x in (learned.factors, given.numbers))
    asked = Asked(t, s, arrays, given.seed, bias, *of_heads)
    if bias is None or len(bias.axes) == 1:
        return asked, {}
    return asked._replace(bias=None), {"bias": Part(bias.array, bias.axes)}


def _of_bias(call, bias, T, S):
    """The gradient of a bias (#B #N #T #S)."""
    by_query, by_key = (n > 1 for n in bias.shape[2:])
    if by_query and by_key:
        return call(biases.of_scores, "row")[:, :, :T, :S].astype(bias.dtype)
    over = "column" if by_key else "row"
    x = call(biases.along, over, over=over)
    x = x[..., None, :S] if by_key else x[..., :T, None]
    shared = tuple(i for i, n in enumerate(bias.shape) if n == 1)
    return x.sum(shared, keepdims=True).astype(bias.dtype)
