r"""The selective scan of Mamba (S6): each channel has a small state of its own, with chosen steps.

    h_t = exp(delta_t rate) h_{t-1} + delta_t x_t b_t        h_{-1} = initial_state, the last h
    y_t = h_t . c_t + skip x_t                               is returned

h is (H M) for each head: M entries for each of H channels. delta, one step size for each channel
and token, says how much of the state goes and how much of the token comes; b and c, shared by the
channels of a head, say where in the state it is written and read.

Time is walked in chunks that carry h, of which one at a time is spread over its M entries, also in
the backward pass. Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State
Spaces", arXiv:2312.00752, algorithm 2 and section 3.3.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.selective_scan import xla


def selective_scan(
    x: Float[Array, "B T N H"],
    delta: Float[Array, "B T N H"],
    rate: Float[Array, "N H M"],
    b: Float[Array, "B T N M"],
    c: Float[Array, "B T N M"],
    skip: Float[Array, "N H"],
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B N H M"] | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N H M"]]:
    """(y in x's dtype, final state in float32); accumulates in float32.

    Args:
      delta: finite and >= 0; a step of 0 changes nothing.
      rate: finite and <= 0.
      segments: numbers of the documents packed into a sequence, each of them one run of tokens.
        The initial state belongs to the first, the final state to the last.
      initial_state: the state after earlier tokens; None is zero.
      chunk: tokens taken at once.

    All arrays but segments have gradients. Raises ValueError for arguments that don't fit.
    """
    _check(x, delta, rate, b, c, skip, segments, initial_state, chunk)
    B, T, N, H = x.shape
    state = jnp.zeros_like(x, jnp.float32, (B, N, H, b.shape[-1]))  # varies on a mesh as x does
    if initial_state is not None:
        state = state + initial_state
    new = jnp.zeros((B, T), bool)
    if segments is not None:
        new = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    y, state = xla.selective_scan(x, delta, rate, b, c, new, state, chunk=chunk)
    y = y + skip.astype(jnp.float32)[None, None] * x.astype(jnp.float32)
    return y.astype(x.dtype), state


def _check(x, delta, rate, b, c, skip, segments, initial_state, chunk):
    if chunk < 1:
        raise ValueError(f"{chunk=} must be at least 1")
    (B, T, N, H), M = x.shape, b.shape[-1]
    if T == 0:
        raise ValueError(f"x of shape {x.shape} must have at least one token")
    for name, array, shape in (
        ("delta", delta, (B, T, N, H)),
        ("rate", rate, (N, H, M)),
        ("b", b, (B, T, N, M)),
        ("c", c, (B, T, N, M)),
        ("skip", skip, (N, H)),
        ("segments", segments, (B, T)),
        ("initial_state", initial_state, (B, N, H, M)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} of shape {array.shape} must have shape {shape}")
