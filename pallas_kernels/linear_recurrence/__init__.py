r"""Linear recurrences with a gate, from an initial state to a final one: three in one form.

    S_t = diag(exp(g_t)) S_{t-1} + k_t u_t^T          S_{-1} = initial_state, S_{T-1} is returned
    o_t = S_t^T q_t

    u_t = v_t                                                   without beta: gated linear attention
    u_t = beta_t (v_t - (diag(exp(g_t)) S_{t-1})^T k_t)         with beta: the (gated) delta rule

g = log_decay is one number for each token and head (RetNet, Mamba-2, Gated DeltaNet), or one for
each key channel (GLA, HGRN-2), or absent (linear attention, DeltaNet).

Time is walked in chunks that carry the state (H V): `chunk` is the maths of one chunk, `xla` and
`mosaic_tpu` only drive it, backward too, from the states between chunks that forward has kept;
`mosaic_gpu` carries the state through what XLA has made of each chunk by that maths.
Within a chunk the weights of its tokens are products of matrices with C rows, and the delta rule is
the solution of a triangular system. No exponent is ever positive, so nothing overflows. Source:
Yang et al., "Gated Linear Attention Transformers", arXiv:2312.06635, section 4; "Parallelizing
Linear Transformers with the Delta Rule", arXiv:2406.06484, section 3.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import placing, tables
from pallas_kernels import segments as documents
from pallas_kernels.linear_recurrence import mosaic_gpu, mosaic_tpu, xla

Implementation = Literal["xla", "pallas", "interpret"]
_NAME, _CHUNK = "linear_recurrence", 64


def linear_recurrence(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    *,
    log_decay: Float[Array, "#B #T N G"] | None = None,
    beta: Float[Array, "B T N"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B N H V"] | None = None,
    chunk: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
    """(o in v's dtype, final state in float32); accumulates in float32.

    Args:
      log_decay: finite and <= 0; G is 1, a decay of the head, or H, one of each key channel.
      beta: how much of what is stored under a key is replaced; with it keys should have norm <= 1
        and beta be in [0, 2], or the state may grow without bound.
      segments: numbers of the documents packed into a sequence, each of them one run of tokens.
        The initial state belongs to the first, the final state to the last.
      initial_state: the state after earlier tokens; None is zero.
      chunk: tokens taken at once, a multiple of 16; on a GPU "pallas" takes 64.
      implementation: "xla", "pallas" (TPU, and Hopper GPUs), or "interpret", which runs the kernel
        for TPU on any platform, slowly. None is the kernel where the call is lowered for TPU and
        runs whole on each device (`placing`), and XLA elsewhere. Only "xla" has forward-mode
        derivatives (jax.jvp) and derivatives of the gradient.

    All arrays but segments have gradients. Raises ValueError for arguments that don't fit, and
    where it is lowered NotImplementedError for what the kernel that was asked for can't:
    `mosaic_gpu.forward` says what that is on a GPU.
    """
    if chunk is None:
        chunk = tables.here().tile("chunk", _CHUNK, _NAME, **tables.case_of(k))
    _check(q, k, v, log_decay, beta, segments, initial_state, chunk, implementation)
    B, T, N, H = k.shape
    # zeros vary over the axes of a mesh that k varies over, and so does what is added to them
    zeros = lambda dtype, *shape: jnp.zeros_like(k, dtype, shape)
    state, starts = zeros(jnp.float32, B, N, H, v.shape[-1]), None
    if initial_state is not None:
        state = state + initial_state
    if log_decay is not None:
        log_decay = log_decay + zeros(log_decay.dtype, B, T, N, log_decay.shape[-1])
    if segments is not None:
        starts = documents.starts(segments) + zeros(jnp.int32, B, T)
    tokens = q, k, v, log_decay, None if beta is None else beta[..., None]
    if implementation == "xla":
        return xla.forward(tokens, state, starts, chunk=chunk, keep=False)
    return _op(tokens, state, starts, chunk, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _op(tokens, state, starts, chunk, implementation):
    return _run("forward", (tokens, state, starts), implementation, chunk=chunk, keep=False)


def _forward(tokens, state, starts, chunk, implementation):
    args = tokens, state, starts
    o, last, states = _run("forward", args, implementation, chunk=chunk, keep=True)
    return (o, last), (tokens, starts, states)


def _backward(chunk, implementation, residuals, cotangents):
    return *_run("backward", (*residuals, *cotangents), implementation, chunk=chunk), None


_op.defvjp(_forward, _backward)


def _run(name, args, implementation, **options):
    by = lambda module: functools.partial(getattr(module, name), **options)
    kernels = dict(tpu=by(mosaic_tpu), gpu=by(mosaic_gpu))
    (_, k, *_), *_ = args
    row = tables.here().find(_NAME, **tables.case_of(k))
    return placing.run(args, implementation, xla=by(xla), row=row, **kernels)


def _check(q, k, v, log_decay, beta, segments, initial_state, chunk, implementation):
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(f"{implementation=} must be one of {get_args(Implementation)}")
    if chunk < 16 or chunk % 16:
        raise ValueError(f"{chunk=} must be a positive multiple of 16")
    (B, T, N, H), V = k.shape, v.shape[-1]
    if T == 0 or q.shape != k.shape or v.shape != (B, T, N, V):
        raise ValueError(f"shapes don't fit: q {q.shape}, k {k.shape}, v {v.shape}")
    if log_decay is not None:
        b, t, n, G = log_decay.shape
        if b not in (1, B) or t not in (1, T) or n != N or G not in (1, H):
            expected = f"({B} or 1, {T} or 1, {N}, {H} or 1)"
            raise ValueError(f"log_decay of shape {log_decay.shape} must have shape {expected}")
    for name, x, shape in (
        ("beta", beta, (B, T, N)),
        ("segments", segments, (B, T)),
        ("initial_state", initial_state, (B, N, H, V)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} of shape {x.shape} must have shape {shape}")
