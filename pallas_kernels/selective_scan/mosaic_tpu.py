"""Pallas kernels for TPU: the grid walks (sequence, head, part of the channels, chunk).

Channels lie in lanes and the entries of their states in sublanes, so that a token is a few
operations on (M H). h stays in registers while a loop goes over groups of tokens, and in VMEM from
chunk to chunk. b and c of a group are turned: those of a token are then a column beside h.
"""

import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.selective_scan import layout

fits = layout.fits
_GROUP = layout.GROUP


def forward(tokens, weights, state, new, *, chunk, keep=True, interpret=False):
    """(y, final state, and with `keep` the states (B N chunks M H) before each chunk)."""
    (B, T, N, H), M = tokens[0].shape, state.shape[-1]
    cut = _cut(H, M, T, chunk)
    inputs = cut.inputs(tokens, weights, new) | dict(before=cut.state(state))
    outputs = dict(y=inputs["x"], after=inputs["before"])
    if keep:
        shape = (B, N, cut.chunks, M, cut.parts * cut.L)
        outputs["states"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    out = _call(_forward, cut, inputs, outputs, interpret=interpret, name="selective_scan")
    y, after, *states = out.values()
    return layout.join(y, tokens[0]), after[..., :H].mT, *(h[..., :H] for h in states)


def _cut(H, M, T, chunk):
    if not fits(M, chunk):
        raise NotImplementedError(
            f"the kernel for TPU can't hold {chunk=} states of {M=} entries; a smaller chunk or "
            "'xla' can"
        )
    return layout.Cut.of(H, M, T, chunk)


def _forward(refs):
    _begin(refs.after, refs.before)
    state, rate, skip = refs.after[...], _load(refs.rate), _load(refs.skip)
    if hasattr(refs, "states"):
        refs.states[...] = state

    def group(i, h):
        tokens, ys = _Group.of(refs, i), []
        for t in range(_GROUP):
            h = tokens.decay(rate, t) * h + tokens.added(t)
            ys.append((h * tokens.c[:, t : t + 1]).sum(0, keepdims=True))
        y = jnp.concatenate(ys) + skip * tokens.x
        refs.y[tokens.rows, :] = y.astype(refs.y.dtype)
        return h

    refs.after[...] = jax.lax.fori_loop(0, refs.y.shape[0] // _GROUP, group, state)


def backward(tokens, weights, new, states, dy, dstate, *, chunk, interpret=False):
    """Gradients of (tokens, weights, initial state) by those of the output and the final state."""
    (_, T, _, H), M = dy.shape, dstate.shape[-1]
    cut = _cut(H, M, T, chunk)
    inputs = cut.inputs(tokens, weights, new)
    inputs |= dict(states=cut.lanes(states), dy=cut.channels(dy), dafter=cut.state(dstate))
    entries = [jax.ShapeDtypeStruct(cut.of_parts(inputs[k].shape), jnp.float32) for k in "bc"]
    state = inputs["dafter"]
    row = jax.ShapeDtypeStruct((*state.shape[:2], 1, state.shape[3]), jnp.float32)
    outputs = dict(dx=inputs["x"], ddelta=inputs["delta"], db=entries[0], dc=entries[1])
    outputs |= dict(drate=state, dskip=row, dbefore=state)
    name = "selective_scan_backward"
    out = _call(_backward, cut, inputs, outputs, interpret=interpret, name=name)
    dtokens = out["dx"], out["ddelta"], out["db"].sum(2), out["dc"].sum(2)
    drate, dskip = out["drate"].sum(0)[..., :H].mT, out["dskip"].sum(0)[:, 0, :H]
    dweights = tuple(d.astype(w.dtype) for d, w in zip((drate, dskip), weights, strict=True))
    dtokens = tuple(layout.join(*pair) for pair in zip(dtokens, tokens, strict=True))
    return dtokens, dweights, out["dbefore"][..., :H].mT


def _backward(refs, before):
    """before: memory for the states before each token (C M L)."""
    _begin(refs.dbefore, refs.dafter)
    _begin(refs.drate, None)
    _begin(refs.dskip, None)
    rate, skip = _load(refs.rate), _load(refs.skip)
    groups = refs.dy.shape[0] // _GROUP

    def remember(i, h):
        tokens = _Group.of(refs, i)
        for t in range(_GROUP):
            before[i * _GROUP + t] = h
            h = tokens.decay(rate, t) * h + tokens.added(t)
        return h

    def back(i, carry):
        tokens = _Group.of(refs, groups - 1 - i)
        dy = _load(refs.dy, tokens.rows)
        *carry, rows = _back(tokens, rate, dy, before, *carry)
        dx, ddelta, db, dc = rows
        refs.dskip[...] += (dy * tokens.x).sum(0, keepdims=True)
        refs.dx[tokens.rows, :] = (dx + skip * dy).astype(refs.dx.dtype)
        refs.ddelta[tokens.rows, :] = ddelta.astype(refs.ddelta.dtype)
        refs.db[tokens.rows, :], refs.dc[tokens.rows, :] = db.T, dc.T
        return tuple(carry)

    jax.lax.fori_loop(0, groups, remember, refs.states[...])
    carry = refs.dbefore[...], refs.drate[...]
    refs.dbefore[...], refs.drate[...] = jax.lax.fori_loop(0, groups, back, carry)


def _back(tokens, rate, dy, before, dh, drate):
    """(dh before the group, drate with it added, gradients of its x, delta, and columns b and c)"""
    rows = []
    for t in reversed(range(_GROUP)):
        at = slice(t, t + 1)
        b, c, x, delta = tokens.b[:, at], tokens.c[:, at], tokens.x[at], tokens.delta[at]
        h, decay = before[tokens.first + t], tokens.decay(rate, t)
        dc = ((decay * h + tokens.added(t)) * dy[at]).sum(1, keepdims=True)
        dh = dh + c * dy[at]
        db = (dh * (delta * x)).sum(1, keepdims=True)
        dadded = (dh * b).sum(0, keepdims=True)
        dh = decay * dh
        dexponent = dh * h
        drate = drate + dexponent * delta
        ddelta = (dexponent * rate).sum(0, keepdims=True) + dadded * x
        rows.append((dadded * delta, ddelta, db, dc))
    pairs = zip(zip(*rows[::-1], strict=True), (0, 0, 1, 1), strict=True)
    return dh, drate, [jnp.concatenate(parts, axis) for parts, axis in pairs]


class _Group(NamedTuple):
    """Tokens, in float32, that a step of the loop takes; their b and c are columns."""

    first: jax.Array  # of its tokens, in the chunk
    rows: object
    x: jax.Array  # (tokens, L)
    delta: jax.Array
    b: jax.Array  # (M, tokens)
    c: jax.Array
    keeps: object  # 0 where a token begins a segment, else 1; None where none does

    @classmethod
    def of(cls, refs, i):
        first = pl.multiple_of(i * _GROUP, _GROUP)
        rows = pl.ds(first, _GROUP)
        x, delta, b, c = (_load(ref, rows) for ref in (refs.x, refs.delta, refs.b, refs.c))
        return cls(first, rows, x, delta, b.T, c.T, getattr(refs, "keeps", None))

    def decay(self, rate, t):
        decay = jnp.exp(self.delta[t : t + 1] * rate)
        return decay if self.keeps is None else decay * self.keeps[0, self.first + t]

    def added(self, t):
        at = slice(t, t + 1)
        return self.delta[at] * self.x[at] * self.b[:, at]


def _load(ref, rows=slice(None)):
    return ref[rows, :].astype(jnp.float32)


def _begin(ref, initial):
    """The first chunk's: what stays in VMEM until the last."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        ref[...] = jnp.zeros_like(ref) if initial is None else initial[...]


def _call(kernel, cut, inputs, outputs, *, interpret, name):
    """{name: array} of the outputs; `kernel(refs, *scratch)` gets references by their names."""
    backward = name.endswith("backward")
    names, x = [*inputs, *outputs], inputs["x"]
    blocks = cut.blocks(backward)
    mat = jax.typeof(x).mat  # outputs vary over the axes of a mesh that inputs vary over

    def body(*refs):
        kernel(
            types.SimpleNamespace(**dict(zip(names, refs[: len(names)], strict=True))),
            *refs[len(names) :],
        )

    out = pl.pallas_call(
        body,
        grid=(*x.shape[:2], cut.parts, cut.chunks),
        in_specs=[blocks[name] for name in inputs],
        out_specs=[blocks[name] for name in outputs],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=mat) for x in outputs.values()
        ],
        scratch_shapes=[pltpu.VMEM((cut.C, cut.M, cut.L), jnp.float32)] * backward,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(cut, inputs, outputs, passes=4 if backward else 1),
        interpret=interpret,
        name=name,
    )(*inputs.values())
    return dict(zip(outputs, out, strict=True))


def _cost(cut, inputs, outputs, *, passes):
    """What XLA can't see inside the kernel."""
    count = inputs["x"].size * cut.M
    arrays = [*inputs.values(), *outputs.values()]
    return pl.CostEstimate(
        flops=6 * passes * count,
        transcendentals=(1 if passes == 1 else 2) * count,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )
