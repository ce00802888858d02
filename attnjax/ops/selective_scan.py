r"""The selective scan of Mamba (S6), under masks, and with the choice of its steps.

    h_t = exp(delta_t rate) h_{t-1} + delta_t x_t b_t,    y_t = h_t . c_t + skip x_t

    [r_t, b_t, c_t] = x_t select,    delta_t = softplus(r_t widen + bias),    rate = -exp(log_rate)

The maths of the scan is in `pallas_kernels.selective_scan`; here masks become what it understands:
a token that is not valid changes nothing, as its step is 0, and a document that begins resets the
state. Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
arXiv:2312.00752, algorithm 2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.core import masks
from attnjax.ops import state_masks
from pallas_kernels import selective_scan as kernels


def selective_scan(
    x: Float[Array, "B T N H"],
    delta: Float[Array, "B T N H"],
    rate: Float[Array, "N H M"],
    b: Float[Array, "B T N M"],
    c: Float[Array, "B T N M"],
    skip: Float[Array, "N H"],
    *,
    mask: masks.Mask | None = None,
    initial_state: Float[Array, "B N H M"] | None = None,
    implementation: kernels.Implementation | None = "xla",
    by: str = "selective_scan",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N H M"]]:
    """(y in x's dtype, final state in float32). Always causal; O(T) time and memory.

    Args:
      delta: >= 0.
      rate: <= 0.
      mask: any of Causal (which holds anyway), Valid, and Segments of which each is one run of
        tokens. The initial state belongs to the first segment, the final state to the last.
      implementation: as in `pallas_kernels.selective_scan`. Not None by default, which is the
        kernel on a TPU: only "xla" has forward-mode derivatives.
      by: who asks, for error messages.

    Raises NotImplementedError for any other mask, ValueError for shapes that don't fit.
    """
    _, valid, segments = masks.select(mask, masks.Causal, masks.Valid, masks.Segments, by=by)
    return kernels.selective_scan(
        state_masks.only_valid(x, valid),
        state_masks.only_valid(delta, valid),
        rate,
        b,
        c,
        skip,
        segments=state_masks.documents(segments, by),
        initial_state=initial_state,
        implementation=implementation,
    )


def carry(
    delta: Float[Array, "B T N H"], rate: Float[Array, "N H M"], *, mask: masks.Mask | None = None
) -> Float[Array, "B N H M"]:
    """What an initial state is multiplied by over all tokens: 0 where another segment begins.

    Raises NotImplementedError as `selective_scan` does.
    """
    _, valid, segments = masks.select(mask, masks.Causal, masks.Valid, masks.Segments, by="carry")
    time = state_masks.only_valid(delta, valid).astype(jnp.float32).sum(1)
    factor = jnp.exp(time[..., None] * rate.astype(jnp.float32)[None])
    flat = factor.reshape(*time.shape[:2], -1, 1)
    return state_masks.only_first(flat, segments).reshape(factor.shape)


def choose(
    x: Float[Array, "B T N H"],
    select: Float[Array, "N H F"],
    widen: Float[Array, "N R H"],
    bias: Float[Array, "N H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N M"], Float[Array, "B T N M"]]:
    """(delta, b, c) in float32, of M = (F - R) / 2. Raises ValueError where that is no number."""
    R, F = widen.shape[1], select.shape[2]
    if F <= R or (F - R) % 2:
        raise ValueError(f"select {select.shape} must end in {R=} and twice the size of a state")
    select, widen, bias = (w.astype(jnp.float32) for w in (select, widen, bias))
    chosen = jnp.einsum("BTNH,NHF->BTNF", x.astype(jnp.float32), select)
    r, b, c = jnp.split(chosen, [R, R + (F - R) // 2], -1)
    delta = jnp.einsum("BTNR,NRH->BTNH", r, widen) + bias[None, None]
    return jax.nn.softplus(delta), b, c


def selected_scan(
    x: Float[Array, "B T N H"],
    select: Float[Array, "N H F"],
    widen: Float[Array, "N R H"],
    bias: Float[Array, "N H"],
    log_rate: Float[Array, "N H M"],
    skip: Float[Array, "N H"],
    *,
    mask: masks.Mask | None = None,
    initial_state: Float[Array, "B N H M"] | None = None,
    implementation: kernels.Implementation | None = "xla",
    by: str = "selected_scan",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N H M"]]:
    """`selective_scan` with the delta, b and c that `choose` gives for each token of x."""
    delta, b, c = choose(x, select, widen, bias)
    rate = -jnp.exp(log_rate.astype(jnp.float32))
    options = dict(mask=mask, initial_state=initial_state, implementation=implementation, by=by)
    return selective_scan(x, delta, rate, b, c, skip, **options)
