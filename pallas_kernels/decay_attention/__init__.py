r"""Causal linear attention with a fixed decay per head, from an initial state to a final one.

    S_t = exp(log_decay) S_{t-1} + k_t v_t^T          S_{-1} = initial_state, S_{T-1} is returned
    o_t = S_t^T q_t

With `segments` the state starts again from zero wherever the segment changes.

Time is walked in chunks that carry the state (H V): `chunk` is the maths of one chunk, `xla` and
`mosaic_tpu` only drive it; `mosaic_gpu` is the recurrence whose decay varies. No exponent is ever
positive, so nothing overflows for a decay <= 1.

Let op(q, k, v, S) be this with S already decayed for the first token: S = exp(log_decay) S_{-1}.
It is its own adjoint up to a reversal R of time, so the backward pass is three forward calls:

    dq     = op(do, v, k, S^T)
    dk     = R op(R v, R do, R q, dS_T^T)
    dv, dS = R op(R k, R q, R do, dS_T)               dS_T: gradient of the final state
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import placing, tables
from pallas_kernels import segments as documents
from pallas_kernels.decay_attention import mosaic_gpu, mosaic_tpu, xla

Implementation = Literal["xla", "pallas", "interpret"]
_NAME, _CHUNK = "decay_attention", 128


def decay_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    log_decay: Float[Array, "N"],
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B N H V"] | None = None,
    chunk: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
    """(o in v's dtype, final state in float32); accumulates in float32.

    Args:
      log_decay: finite and <= 0. A constant: its gradient is zero in every implementation.
      segments: numbers of the documents packed into a sequence, each of them one run of tokens.
        The initial state belongs to the first, the final state to the last.
      initial_state: the state after earlier tokens; None is zero.
      chunk: tokens taken at once, a multiple of 16; None is what the table of the device says
        (`pallas_kernels.tables`), or 128. On a GPU "pallas" takes them by 64, for chunks that are
        multiples of it.
      implementation: "xla", "pallas" (TPU, and Hopper GPUs), or "interpret", which runs the kernel
        for TPU on any platform, slowly. None is the kernel where the call is lowered for TPU and
        runs whole on each device (`placing`), and XLA elsewhere.

    Everything else has a gradient. Raises ValueError for arguments that don't fit, and where it is
    lowered NotImplementedError for what the kernel that was asked for can't.
    """
    if chunk is None:
        chunk = tables.here().tile("chunk", _CHUNK, _NAME, **tables.case_of(k))
    _check(q, k, v, log_decay, segments, initial_state, chunk, implementation)
    B, _, N, H = k.shape
    log_decay = jax.lax.stop_gradient(log_decay.astype(jnp.float32))
    state = jnp.zeros_like(k, jnp.float32, (B, N, H, v.shape[-1]))  # varies on a mesh as k does
    if initial_state is not None:
        state = state + jnp.exp(log_decay)[None, :, None, None] * initial_state
    return _op(q, k, v, state, segments, log_decay, chunk, implementation)


def _check(q, k, v, log_decay, segments, initial_state, chunk, implementation):
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(f"{implementation=} must be one of {get_args(Implementation)}")
    if chunk < 16 or chunk % 16:
        raise ValueError(f"{chunk=} must be a positive multiple of 16")
    (B, T, N, H), V = k.shape, v.shape[-1]
    if T == 0 or q.shape != k.shape or v.shape != (B, T, N, V) or log_decay.shape != (N,):
        raise ValueError(
            f"shapes don't fit: q {q.shape}, k {k.shape}, v {v.shape}, log_decay {log_decay.shape}"
        )
    if segments is not None and segments.shape != (B, T):
        raise ValueError(f"segments of shape {segments.shape} must have shape {(B, T)}")
    if initial_state is not None and initial_state.shape != (B, N, H, V):
        raise ValueError(f"a state of shape {initial_state.shape} must have shape {(B, N, H, V)}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _op(q, k, v, state, segments, log_decay, chunk, implementation):
    args = q, k, v, state, None if segments is None else documents.starts(segments), log_decay
    by = lambda module: functools.partial(module.decay_attention, chunk=chunk)
    kernels = dict(tpu=by(mosaic_tpu), gpu=by(mosaic_gpu))
    row = tables.here().find(_NAME, **tables.case_of(k))
    return placing.run(args, implementation, xla=by(xla), row=row, **kernels)


def _forward(q, k, v, state, segments, log_decay, chunk, implementation):
    out = _op(q, k, v, state, segments, log_decay, chunk, implementation)
    return out, (q, k, v, state, segments, log_decay)


def _backward(chunk, implementation, residuals, cotangents):
    (q, k, v, state, segments, log_decay), (do, dlast) = residuals, cotangents
    reverse = lambda x: None if x is None else jnp.flip(x, 1)
    op = lambda q, k, v, state, segments: _op(
        q, k, v, state, segments, log_decay, chunk, implementation
    )

    def op_reversed(q, k, v, state):
        out, last = op(reverse(q), reverse(k), reverse(v), state, reverse(segments))
        return reverse(out), last

    dq, _ = op(do, v, k, state.mT, segments)
    dk, _ = op_reversed(v, do, q, dlast.mT)
    dv, dstate = op_reversed(k, q, do, dlast)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv, dstate, None, None


_op.defvjp(_forward, _backward)
