"""The kernels: a state goes from chunk to chunk, and what needs it is made on the way.

Matrices lie with the values' features before all others: S is (V H), so that a warpgroup has the
rows of 64 of them, whatever the others do. All others are second operands of products, laid out
with the sum's axis last, as TF32 demands.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_recurrence.mosaic_gpu import call as calls
from pallas_kernels.linear_recurrence.mosaic_gpu.pieces import Pieces
from pallas_kernels.linear_recurrence.mosaic_gpu.walk import Chunk


def forward(x: Pieces, state, *, keep, interpret):
    """(final state (heads V H), o (chunks V C), and with `keep` the states before each chunk).

    Args:
      x: q (chunks C H), k (chunks H C), v (chunks V C), read (chunks C H) or None and weights
        (chunks C C) in the dtype of products, kept (chunks H) in float32; all chunks of a head in
        turn.
      state: (heads V H) in float32.
    """
    states = jax.ShapeDtypeStruct((len(x.kept), *state.shape[1:]), jnp.float32)
    outputs = [jax.ShapeDtypeStruct(x.v.shape, x.v.dtype), *[states] * keep]
    options = dict(reverse=False, interpret=interpret, name="linear_recurrence")
    return calls.call(_forward, x, state, outputs, **options)


def backward(x: Pieces, dstate, *, interpret):
    """Cotangents of the initial state (heads V H), of u (chunks V C) and the states after chunks.

        du = weights^T do + k dS',    dS = kept dS' + q^T do + read^T du

    Args:
      x: q (chunks H C), k (chunks C H), the cotangents of outputs as v (chunks V C), read
        (chunks H C) or None, weights^T (chunks C C) and kept (chunks H), else as above.
      dstate: (heads V H) in float32, the cotangent of the final state.
    """
    after = jax.ShapeDtypeStruct((len(x.kept), *dstate.shape[1:]), x.v.dtype)
    outputs = [jax.ShapeDtypeStruct(x.v.shape, x.v.dtype), after]
    options = dict(reverse=True, interpret=interpret, name="linear_recurrence_backward")
    return calls.call(_backward, x, dstate, outputs, **options)


def _forward(chunk: Chunk, state, o_ref, *states_ref):
    x, shared = chunk.pieces, chunk.shared
    if states_ref:
        chunk.put_out(state, shared.state, *states_ref)
    shared.now[...] = state.astype(shared.now.dtype)
    plgpu.commit_smem()

    def with_output(o):
        plgpu.wgmma(o, shared.now, x.q.T)
        u = x.v
        if x.read is not None:
            u = shared.u
            values = plgpu.load(x.v, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            values = values + _product(shared.now, x.read.T)
            u[...] = values.astype(u.dtype)
            plgpu.commit_smem()
        plgpu.wgmma(o, u, x.weights.T)
        return _product(u, x.k.T), o[...]

    added, o = pl.run_scoped(with_output, _sums(x.v))
    chunk.put_out(o, shared.o, o_ref)
    return _kept(x, state) + added


def _backward(chunk: Chunk, after, du_ref, after_ref):
    x, shared = chunk.pieces, chunk.shared
    chunk.put_out(after, shared.now, after_ref)

    def of_values(du):
        plgpu.wgmma(du, shared.now, x.k.T)
        plgpu.wgmma(du, x.v, x.weights.T)
        return du[...]

    chunk.put_out(pl.run_scoped(of_values, _sums(x.v)), shared.u, du_ref)

    def of_state(added):
        plgpu.wgmma(added, x.v, x.q.T)
        if x.read is not None:
            plgpu.wgmma(added, shared.u, x.read.T)
        return added[...]

    added = pl.run_scoped(of_state, _sums(shared.now))
    return _kept(x, after) + added


def _kept(x, state):
    """What is left of a state, of which each column has a decay of its own."""
    kept = plgpu.load(x.kept, layout=plgpu.Layout.WGMMA.reduce(0))
    return state * lax.broadcast_in_dim(kept, state.shape, (1,))


def _product(a, b):
    """a b in float32, of references; all products begun before are done too."""

    def multiply(sums):
        plgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _sums(like):
    return plgpu.ACC(like.shape, jnp.float32)
