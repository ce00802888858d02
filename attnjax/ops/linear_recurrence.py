r"""Linear recurrences with gates, under masks.

    S_t = diag(exp(g_t)) S_{t-1} + k_t u_t^T,    o_t = S_t^T q_t      u: values, or the delta rule's

The maths is in `pallas_kernels.linear_recurrence`; here masks become what it understands: a token
that is not valid changes nothing, a document that begins resets the state. A decay is made of its
token, so at padding it counts as none; `ops.decay_attention`, where it is a constant, goes by time.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.core import masks
from attnjax.ops import state_masks
from pallas_kernels import linear_recurrence as kernels


def linear_recurrence(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    *,
    log_decay: Float[Array, "#B #T N G"] | None = None,
    beta: Float[Array, "B T N"] | None = None,
    mask: masks.Mask | None = None,
    initial_state: Float[Array, "B N H V"] | None = None,
    implementation: kernels.Implementation | None = "xla",
    by: str = "linear_recurrence",
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
    """(o in v's dtype, final state in float32). Always causal; O(T) time and memory.

    Args:
      log_decay: of the head (G = 1) or of each key channel (G = H), finite and <= 0.
      beta: with it u is the delta rule's.
      mask: any of Causal (which holds anyway), Valid, and Segments of which each is one run of
        tokens. The initial state belongs to the first segment, the final state to the last.
      implementation: as in `pallas_kernels.linear_recurrence`, where "pallas" is a kernel for TPU
        or for Hopper GPUs. Not None by default, which is the kernel on a TPU: only "xla" has
        forward-mode derivatives.
      by: who asks, for error messages.

    Raises NotImplementedError for any other mask, ValueError for shapes that don't fit.
    """
    _, valid, segments = masks.select(mask, masks.Causal, masks.Valid, masks.Segments, by=by)
    if log_decay is not None:
        log_decay = state_masks.only_valid(log_decay, valid)
    return kernels.linear_recurrence(
        q,
        state_masks.only_valid(k, valid),
        v,
        log_decay=log_decay,
        beta=beta,
        segments=state_masks.documents(segments, by),
        initial_state=initial_state,
        implementation=implementation,
    )


def carry(
    log_decay: Float[Array, "#B T N G"], *, mask: masks.Mask | None = None
) -> Float[Array, "#B N G 1"]:
    """What an initial state is multiplied by over all tokens, without beta.

    It is 0 where another segment begins. Raises NotImplementedError as `linear_recurrence` does.
    """
    _, valid, segments = masks.select(mask, masks.Causal, masks.Valid, masks.Segments, by="carry")
    log_decay = state_masks.only_valid(log_decay, valid)
    factor = jnp.exp(log_decay.astype(jnp.float32).sum(1))[..., None]
    return state_masks.only_first(factor, segments)
