r"""Linear recurrences with a gate, from an initial state to a final one: three in one form.

    S_t = diag(exp(g_t)) S_{t-1} + k_t u_t^T          S_{-1} = initial_state, S_{T-1} is returned
    o_t = S_t^T q_t

    u_t = v_t                                                   without beta: gated linear attention
    u_t = beta_t (v_t - (diag(exp(g_t)) S_{t-1})^T k_t)         with beta: the (gated) delta rule

g = log_decay is one number for each token and head (RetNet, Mamba-2, Gated DeltaNet), or one for
each key channel (GLA, HGRN-2), or absent (linear attention, DeltaNet).

Time is walked in chunks that carry the state (H V): `chunk` is the maths of one chunk, `xla` only
drives it. Within a chunk the weights of its tokens are products of matrices with C rows, and the
delta rule is the solution of a triangular system. No exponent is ever positive, so nothing
overflows. Source: Yang et al., "Gated Linear Attention Transformers", arXiv:2312.06635, section 4;
"Parallelizing Linear Transformers with the Delta Rule", arXiv:2406.06484, section 3.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import segments as documents
from pallas_kernels.linear_recurrence import xla


def linear_recurrence(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    *,
    log_decay: Float[Array, "#B #T N G"] | None = None,
    beta: Float[Array, "B T N"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B N H V"] | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
    """(o in v's dtype, final state in float32); accumulates in float32.

    Args:
      log_decay: finite and <= 0; G is 1, a decay of the head, or H, one of each key channel.
      beta: how much of what is stored under a key is replaced; with it keys should have norm <= 1
        and beta be in [0, 2], or the state may grow without bound.
      segments: numbers of the documents packed into a sequence, each of them one run of tokens.
        The initial state belongs to the first, the final state to the last.
      initial_state: the state after earlier tokens; None is zero.
      chunk: tokens taken at once, a multiple of 16.

    All arrays but segments have gradients. Raises ValueError for arguments that don't fit.
    """
    _check(q, k, v, log_decay, beta, segments, initial_state, chunk)
    B, T, N, H = k.shape
    if log_decay is not None:
        log_decay = jnp.broadcast_to(log_decay, (B, T, N, log_decay.shape[-1]))
    state = jnp.zeros_like(k, jnp.float32, (B, N, H, v.shape[-1]))  # varies on a mesh as k does
    if initial_state is not None:
        state = state + initial_state
    starts = None if segments is None else documents.starts(segments)
    return xla.linear_recurrence(q, k, v, log_decay, beta, state, starts, chunk=chunk)


def _check(q, k, v, log_decay, beta, segments, initial_state, chunk):
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
