r"""Causal linear attention with a fixed decay per head, under masks.

    o_t = sum_{s <= t, visible} exp(log_decay (t - s)) (q_t . k_s) v_s

Source: Qin et al., "Lightning Attention-2", section 3. The maths is in
`pallas_kernels.decay_attention`; here masks become what it understands: a key that is not valid
becomes zero, a document that begins resets the state. Time passes at padding as elsewhere: the
decay goes by position, as the equation says.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.core import masks
from attnjax.ops import state_masks
from pallas_kernels import decay_attention as kernels


def decay_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    log_decay: Float[Array, "N"],
    *,
    mask: masks.Mask | None = None,
    initial_state: Float[Array, "B N H V"] | None = None,
    implementation: kernels.Implementation | None = None,
    by: str = "decay_attention",
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
    """(o in v's dtype, final state in float32); log_decay is a constant without a gradient.

    Args:
      mask: any of Causal (which holds anyway), Valid, and Segments of which each is one run of
        tokens. The initial state belongs to the first segment, the final state to the last.
      by: who asks, for error messages.

    The other options are those of `pallas_kernels.decay_attention`. Raises NotImplementedError
    for any other mask.
    """
    _, valid, segments = masks.select(mask, masks.Causal, masks.Valid, masks.Segments, by=by)
    return kernels.decay_attention(
        q,
        state_masks.only_valid(k, valid),
        v,
        log_decay,
        segments=state_masks.documents(segments, by),
        initial_state=initial_state,
        implementation=implementation,
    )


def carry(
    log_decay: Float[Array, "N"], T: int, *, mask: masks.Mask | None = None
) -> Float[Array, "#B N 1 1"]:
    """What an initial state is multiplied by over T tokens: 0 where another segment begins.

    A constant, as log_decay is. Raises NotImplementedError for masks that `decay_attention` can't
    honour.
    """
    _, _, segments = masks.select(mask, masks.Causal, masks.Valid, masks.Segments, by="carry")
    factor = jnp.exp(jax.lax.stop_gradient(log_decay) * T)[None, :, None, None]
    return state_masks.only_first(factor, segments)
