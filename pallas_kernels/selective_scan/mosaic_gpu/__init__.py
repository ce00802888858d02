"""Pallas kernels for Hopper GPUs: a warpgroup holds states as a matrix (channels, entries).

A token's x and delta are columns beside it, b and c rows, so that a token is a few operations on
registers. States of many entries are cut into parts, whose outputs are summed. All of time is
walked by one warpgroup: there is work for as many of them as there are sequences, heads, 64
channels and parts.

The backward kernel has the state before each STEP tokens, which the forward one makes again from
those before chunks, and recomputes the others GROUP at a time, in registers.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.selective_scan.mosaic_gpu import call, kernels
from pallas_kernels.selective_scan.mosaic_gpu.kernels import LOG2E
from pallas_kernels.selective_scan.mosaic_gpu.layout import CHANNELS, GROUP, STEP, Cut, fill

_FORWARD, _BACKWARD = 64, 16  # entries of a part that registers have room for


def forward(tokens, weights, state, new, *, chunk, keep=True, interpret=False):
    """(y, final state, and with `keep` the states (B N chunks M H) before each chunk).

    Raises NotImplementedError where it is known that the device is another GPU.
    """
    hopper.check_device(interpret)
    (_, T, _, H), M = tokens[0].shape, state.shape[-1]
    chunk = min(chunk, -(-T // STEP) * STEP)
    cut = Cut.of(T, H, M, whole=STEP).most(_FORWARD)
    inputs = _inputs(cut, tokens, weights, new) | dict(before=cut.state(state))
    every = chunk // STEP if keep else None
    out = _scan(cut, inputs, tokens[0].dtype, every=every, interpret=interpret)
    y = _joined(out["y"])[:, :T, :, :H].astype(tokens[0].dtype)
    states = [out["states"][..., :H, :M].mT] if keep else []
    return y, out["after"][..., :H, :M], *states


def _inputs(cut, tokens, weights, new):
    (x, delta, b, c), (rate, skip) = tokens, weights
    inputs = dict(x=cut.channels(x), delta=cut.channels(delta))
    inputs |= dict(b=cut.entries(b), c=cut.entries(c))
    inputs |= dict(rate=cut.state(rate) * LOG2E)  # exponents of base 2: what the hardware has
    # of one part only, as its outputs are summed
    skip = fill(fill(skip.astype(jnp.float32), 1, cut.H)[None], 0, cut.parts)
    keeps = {} if new is None else dict(keeps=1 - cut.tokens(new.astype(jnp.float32)))
    return inputs | dict(skip=skip) | keeps


def _of_parts(cut, x, dtype):
    """The output of all parts of the entries, shaped like x."""
    return jax.ShapeDtypeStruct((cut.parts, *x.shape), dtype if cut.parts == 1 else jnp.float32)


def _scan(cut, inputs, dtype, *, every, interpret):
    """{y of dtype, after, and the states before each `every` steps}; without dtype no y."""
    x, before = inputs["x"], inputs["before"]
    outputs = {} if dtype is None else dict(y=_of_parts(cut, x, dtype))
    if every:
        (B, N, *shape), count = before.shape, -(-cut.T // STEP // every)
        outputs["states"] = jax.ShapeDtypeStruct((B, N, count, *shape), jnp.float32)
    return call.call(
        functools.partial(kernels.forward, every),
        cut,
        inputs,
        outputs | dict(after=before),
        fetched=("x", "delta", "b", "c"),
        sent=tuple(outputs),
        scratch={},
        interpret=interpret,
        passes=1,
        name="selective_scan",
    )


def backward(tokens, weights, new, states, dy, dstate, *, chunk, interpret=False):
    """Gradients of (tokens, weights, initial state) by those of the output and the final state."""
    (B, T, N, H), M, chunks = dy.shape, dstate.shape[-1], states.shape[2]
    chunk = min(chunk, -(-T // STEP) * STEP)
    cut = Cut.of(T, H, M, whole=chunk)
    inputs = _inputs(cut.most(_BACKWARD), tokens, weights, new)
    states = cut.state(states.swapaxes(1, 2).mT).reshape(B * chunks, N, cut.H, cut.M)
    inputs |= dict(states=_each_step(cut, inputs, states, chunk, interpret))
    inputs |= dict(dy=cut.channels(dy), dafter=cut.state(dstate))
    out = _call_backward(cut.most(_BACKWARD), inputs, interpret)
    dtokens = (_joined(out[name])[:, :T, :, :H] for name in ("dx", "ddelta"))
    columns = (_columns(cut.most(_BACKWARD), out[name], N)[:, :T, :, :M] for name in ("db", "dc"))
    dweights = out["drate"].sum(0)[:, :H, :M], out["dskip"].sum(0)[:, :H]
    like = lambda found, given: tuple(d.astype(x.dtype) for d, x in zip(found, given, strict=True))
    dstate = out["dbefore"][..., :H, :M]
    return like((*dtokens, *columns), tokens), like(dweights, weights), dstate


def _each_step(cut, inputs, states, chunk, interpret):
    """States before each STEP tokens, of those before chunks (B*chunks N H M), in pieces of time.

    All chunks are walked at the same time, as if they were sequences.
    """
    if chunk == STEP:
        return states[:, :, None]
    fold = lambda x: x.reshape(-1, chunk, *x.shape[2:])
    names = [name for name in ("x", "delta", "b", "c", "keeps") if name in inputs]
    by_token = {name: fold(inputs[name]) for name in names}
    cut = cut._replace(T=chunk).most(_FORWARD)
    skip = fill(inputs["skip"][:1], 0, cut.parts)
    inputs = by_token | dict(rate=inputs["rate"], skip=skip, before=states)
    return _scan(cut, inputs, None, every=1, interpret=interpret)["states"]


def _call_backward(cut, inputs, interpret):
    x, delta, state = inputs["x"], inputs["delta"], inputs["dafter"]
    B, N = state.shape[:2]
    blocks = N * cut.H // CHANNELS * cut.parts
    columns = jax.ShapeDtypeStruct((B, blocks, cut.T // GROUP, GROUP * cut.E), jnp.float32)
    row = jax.ShapeDtypeStruct((B, N, cut.H), jnp.float32)
    outputs = dict(dx=_of_parts(cut, x, x.dtype), ddelta=_of_parts(cut, delta, delta.dtype))
    outputs |= dict(db=columns, dc=columns)
    return call.call(
        kernels.backward,
        cut,
        inputs,
        outputs | dict(drate=state, dskip=row, dbefore=state),
        fetched=("x", "delta", "b", "c", "dy", "states"),
        sent=tuple(outputs),
        scratch=dict(before=(STEP // GROUP, CHANNELS, cut.E)),
        interpret=interpret,
        passes=5,  # of a token's arithmetic: its states three times, and as much again with them
        name="selective_scan_backward",
    )


def _joined(x):
    """The sum over parts of the entries."""
    return x[0] if len(x) == 1 else x.sum(0)


def _columns(cut, x, N):
    """(B T N M) of each block's (B blocks groups GROUP*E)."""
    x = x.reshape(len(x), N, -1, cut.parts, cut.T, cut.E).sum(2)
    return jnp.moveaxis(x, 3, 1).reshape(len(x), cut.T, N, cut.M)
