"""Attention as a function with a gradient, from arrays as they come to whole tiles and back."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import vjp
from pallas_kernels.flash_attention.mosaic_gpu import backward, forward
from pallas_kernels.flash_attention.mosaic_gpu import sheet as sheets
from pallas_kernels.flash_attention.mosaic_gpu.tile import LOG2E, Asked
from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import TILE

_FEATURES = 64  # that wgmma's matrices are laid out by


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(static: vjp.Static, learned: vjp.Learned, given: vjp.Given):
    """(o (B T N V), lse (B T N))."""
    (_, T, *_), V = learned.q.shape, learned.v.shape[-1]
    sinks = None if learned.sinks is None else learned.sinks.astype(jnp.float32)
    o, lse = forward.attend(
        static.options,
        *map(_whole, learned[:3]),
        _asked(static, learned, given, "row"),
        sinks,
        vjp.states(static, given),
        interpret=static.interpret,
    )
    return o[:, :T, :, :V], lse[..., :T].swapaxes(1, 2)


def _forward(static, learned, given):
    o, lse = attend(static, learned, given)
    return (o, lse), (learned, given, o, lse)


def _backward(static, residuals, cotangents):
    (learned, given, o, lse), (do, dlse) = residuals, cotangents
    lse, delta = vjp.of_output(o, lse, do, dlse)
    T = -(-lse.shape[1] // TILE) * TILE
    by_query = lambda x, fill: sheets.pad(x.swapaxes(1, 2), 2, T, fill)
    arrays = map(_whole, (*learned[:3], do))
    arrays = *arrays, by_query(lse * LOG2E, jnp.inf), by_query(delta, 0.0)

    def call(kernel, over):
        asked, states = _asked(static, learned, given, over), vjp.states(static, given)
        return kernel(static.options, *arrays, asked, states, interpret=static.interpret)

    grads = call(backward.queries, "row"), *call(backward.keys_and_values, "column")
    grads = [dx[:, : x.shape[1], :, : x.shape[3]] for dx, x in zip(grads, learned[:3], strict=True)]
    dsinks = None if learned.sinks is None else vjp.of_sinks(learned.sinks, lse, delta)
    return vjp.Learned(*grads, None, dsinks), None


attend.defvjp(_forward, _backward)


def _whole(x):
    """(B L heads F), filled up with zeros to whole tiles and matrices."""
    x = sheets.pad(x, 1, -(-x.shape[1] // TILE) * TILE)
    return sheets.pad(x, 3, -(-x.shape[3] // _FEATURES) * _FEATURES)


def _asked(static, learned, given, over):
    """What the mask needs, as a kernel over rows or columns reads it."""
    if static.options.visible is None:
        return Asked(None, None, ())
    sizes = tuple(-(-x.shape[1] // TILE) * TILE for x in (learned.q, learned.k))
    lay = lambda x: sheets.lay(x, sizes, over)
    at = lambda x, shape: lay(jnp.asarray(x, jnp.int32).reshape(shape))
    arrays = tuple(map(lay, given.arrays))
    return Asked(at(given.t, (1, 1, -1, 1)), at(given.s, (1, 1, 1, -1)), arrays)
