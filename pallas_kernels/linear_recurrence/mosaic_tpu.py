"""Pallas kernels for TPU: the grid walks (sequence, head, chunk), the state stays in VMEM.

What is one number a token (gates, starts) lies in rows, (1 C) for a chunk: in a column each number
would take a lane of 128.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_recurrence import chunk as chunks

_TILE = 16  # rows of the smallest tile that any 16- or 32-bit dtype needs


def forward(tokens, state, starts, *, chunk, keep=True, interpret=False):
    """(o, final state, and with `keep` the states before each chunk)."""
    T = tokens[0].shape[1]
    tokens, starts = _cut(tokens, starts, chunk)
    v = tokens[2]
    states = jax.ShapeDtypeStruct((*v.shape[:3], *state.shape[2:]), jnp.float32)
    outputs = (v, state, states) if keep else (v, state)
    o, *states = _call(_forward, (tokens, starts, state), outputs, interpret=interpret)
    return chunks.join(_lay(o), T), *states


def _forward(inputs, outputs):
    (tokens, starts, initial_ref), (o_ref, state_ref, *states_ref) = inputs, outputs
    _begin(state_ref, initial_ref)
    state = state_ref[...]
    for ref in states_ref:
        ref[...] = state
    tokens, start = _load(tokens, starts)
    state_ref[...], o = chunks.attend(state, *tokens, start)
    _store(o_ref, o)


def backward(tokens, starts, states, do, dstate, *, chunk, interpret=False):
    """Gradients of (tokens, initial state) by those of the output and the final state."""
    T = do.shape[1]
    (*tokens, do), starts = _cut((*tokens, do), starts, chunk)
    inputs = tuple(tokens), starts, states, do, dstate
    options = dict(reverse=True, interpret=interpret)
    gradients, dstate = _call(_backward, inputs, (tuple(tokens), dstate), **options)
    return jax.tree.map(lambda x: chunks.join(_lay(x), T), gradients), dstate


def _backward(inputs, outputs):
    (tokens, starts, state_ref, do_ref, last_ref), (dtokens, dstate_ref) = inputs, outputs
    _begin(dstate_ref, last_ref)
    tokens, start = _load(tokens, starts)
    at = state_ref[...], tokens, start
    dstate_ref[...], gradients = chunks.gradients(*at, dstate_ref[...], _column(do_ref[...]))
    jax.tree.map(_store, dtokens, gradients)


def _call(kernel, inputs, outputs, *, reverse=False, interpret):
    """kernel(inputs, outputs) of references, in trees as these, to the part of one chunk."""
    leaves, structure = jax.tree.flatten((inputs, outputs))
    inside = len(jax.tree.leaves(inputs))
    grid = inputs[0][0].shape[:3]

    def block(x):
        chunk = lambda i: grid[2] - 1 - i if reverse else i
        if x.ndim == 4:  # a state, whose block is the same for every chunk: it stays in VMEM
            return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, n, i: (b, n, 0, 0))
        head = lambda n: n if x.shape[1] > 1 else 0
        at = lambda b, n, i: (b, head(n), chunk(i), 0, 0)
        return pl.BlockSpec((None, None, None, *x.shape[3:]), at)

    out = pl.pallas_call(
        lambda *refs: kernel(*jax.tree.unflatten(structure, refs)),
        grid=grid,
        in_specs=[block(x) for x in leaves[:inside]],
        out_specs=[block(x) for x in leaves[inside:]],
        out_shape=[_like(x, leaves[0]) for x in leaves[inside:]],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(inputs, leaves, passes=3 if reverse else 1),
        interpret=interpret,
        name="linear_recurrence_backward" if reverse else "linear_recurrence",
    )(*leaves[:inside])
    return jax.tree.unflatten(jax.tree.structure(outputs), out)


def _begin(state_ref, initial_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = initial_ref[...]


def _cut(tokens, starts, chunk):
    C = min(chunk, -(-tokens[0].shape[1] // _TILE) * _TILE)
    cut = lambda x: _lay(chunks.cut(x, C))
    return jax.tree.map(cut, tokens), None if starts is None else _lay(chunks.cut_starts(starts, C))


def _lay(x):
    """Single numbers of tokens from columns into rows, or back; a chunk has more than one token."""
    return x.mT if 1 in x.shape[-2:] else x


def _load(tokens, starts):
    tokens = jax.tree.map(lambda ref: _column(ref[...]), tokens)
    if starts is None:
        return tokens, jnp.full((tokens[0].shape[0], 1), -1)
    return tokens, _column(starts[...]).astype(jnp.int32)


def _column(x):
    """A row as a column, in float32; anything else as it is."""
    if x.shape[0] > 1:
        return x
    return jnp.where(_diagonal(x.shape[1]), x.astype(jnp.float32), 0.0).sum(1, keepdims=True)


def _store(ref, x):
    if ref.shape[0] == 1:
        x = jnp.where(_diagonal(ref.shape[1]), x, 0.0).sum(0, keepdims=True)
    ref[...] = x.astype(ref.dtype)


def _diagonal(C):
    t, s = chunks.rows_and_columns(C)
    return t == s


def _like(x, beside):
    """x as an output, which varies over the axes of a mesh that an input beside it varies over."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(beside).mat)


def _cost(inputs, leaves, *, passes):
    """What XLA can't see inside the kernel."""
    (q, _, _, decay, beta), (H, V) = inputs[0], inputs[-1].shape[2:]
    count = q.size // H
    C, rule = count // math.prod(q.shape[:3]), 1 if beta is None else 2
    borders = C.bit_length() if decay is not None and decay.size > count else 0
    products = rule * (C * H * (2 * borders or 1) + C * V + H * V) + H * V
    return pl.CostEstimate(
        flops=2 * passes * count * products,
        transcendentals=passes * count * rule * (borders * H or C),
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in leaves),
    )
