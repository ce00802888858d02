"""Attention as a function with a gradient, from arrays as they come to tiles and back."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention import backward, forward, whole
from pallas_kernels.flash_attention import sheet as sheets
from pallas_kernels.flash_attention.tile import Options, Tiles


class Learned(NamedTuple):
    """What has gradients."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    sinks: jax.Array | None
    factors: tuple[jax.Array, ...] = ()  # of score_mod


class Given(NamedTuple):
    """What has none."""

    t: jax.Array
    s: jax.Array
    arrays: tuple[jax.Array, ...]
    seed: jax.Array | None
    states: jax.Array | None  # if not known while tracing
    numbers: tuple[jax.Array, ...] = ()  # of score_mod


class Static(NamedTuple):
    """What is known while tracing."""

    options: Options
    states: np.ndarray | None
    interpret: object


def states(static: Static, given: Given) -> jax.Array | np.ndarray:
    """The states of tiles."""
    return given.states if static.states is None else static.states


def of_output(o, lse, do, dlse) -> tuple[jax.Array, jax.Array]:
    """(lse, delta), with which a query that sees nothing has gradients of 0."""
    empty = lse == -jnp.inf  # its weights and gradients must be 0, not NaN
    delta = jnp.where(empty, 0.0, jnp.sum(do.astype(jnp.float32) * o, -1) - dlse)
    return jnp.where(empty, jnp.inf, lse), delta


def of_sinks(sinks, lse, delta) -> jax.Array:
    """The gradient of sinks, by what `of_output` gives."""
    share = jnp.exp(sinks.astype(jnp.float32)[None, None] - lse)
    return -jnp.sum(share * delta, (0, 1)).astype(sinks.dtype)


def _call(kernel, static, tiles, given):
    return kernel(static.options, tiles, states(static, given), interpret=static.interpret)


def _tiles(static, learned, given, **more):
    """Everything cut into tiles."""
    (bq, bk), bias, sinks = static.options.blocks, learned.bias, learned.sinks
    lay = lambda x: sheets.lay(x, bq, bk)
    options = static.options
    needed = options.visible or options.keep or options.score_mod
    at = lambda x, shape: lay(jnp.asarray(x, jnp.int32).reshape(shape)) if needed else None
    return Tiles(
        q=_heads_first(learned.q, bq),
        k=_heads_first(learned.k, bk),
        v=_heads_first(learned.v, bk),
        t=at(given.t, (1, 1, -1, 1)),
        s=at(given.s, (1, 1, 1, -1)),
        arrays=tuple(map(lay, given.arrays)),
        bias=None if bias is None else lay(bias),
        sinks=None if sinks is None else sinks.astype(jnp.float32),
        seed=given.seed,
        factors=tuple(map(lay, learned.factors)),
        numbers=tuple(map(lay, given.numbers)),
        **more,
    )


def _heads_first(x, block):
    return sheets.pad(x.swapaxes(1, 2), 2, block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(static: Static, learned: Learned, given: Given):
    """(o (B T N V), lse (B T N))."""
    T = learned.q.shape[1]
    o, lse = _call(forward.attend, static, _tiles(static, learned, given), given)
    return o[:, :, :T].swapaxes(1, 2), lse[:, :, 0, :T].swapaxes(1, 2)


def _forward(static, learned, given):
    o, lse = attend(static, learned, given)
    return (o, lse), (learned, given, o, lse)


def _backward(static, residuals, cotangents):
    (learned, given, o, lse), (do, dlse) = residuals, cotangents
    (T, S), (bq, _) = (x.shape[1] for x in learned[:2]), static.options.blocks
    lse, delta = of_output(o, lse, do, dlse)
    by_query = dict(lse=sheets.by_query(lse, bq, jnp.inf), delta=sheets.by_query(delta, bq, 0.0))
    tiles = _tiles(static, learned, given, do=_heads_first(do, bq), **by_query)
    dq = _call(backward.queries, static, tiles, given)
    dk, dv = _call(backward.keys_and_values, static, tiles, given)
    dq, dk, dv = (x.swapaxes(1, 2)[:, :n] for x, n in ((dq, T), (dk, S), (dv, S)))
    dbias = None
    if learned.bias is not None:
        dbias = _call(backward.biases, static, tiles, given)
        dbias = sheets.unlay(dbias, tiles.bias.wide, T, S).astype(learned.bias.dtype)
    dsinks = None if learned.sinks is None else of_sinks(learned.sinks, lse, delta)
    dfactors = ()
    if learned.factors:
        dfactors = _call(backward.factors, static, tiles, given)
        dfactors = tuple(g.astype(x.dtype) for g, x in zip(dfactors, learned.factors, strict=True))
    return Learned(dq, dk, dv, dbias, dsinks, dfactors), None


attend.defvjp(_forward, _backward)
attend_to_part = whole.part_of(_backward)
