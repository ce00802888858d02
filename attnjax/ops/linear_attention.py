r"""Linear attention: weights are products of features, normalised by their sum.

    o_t = phi(q_t) . sum_s phi(k_s) v_s^T / phi(q_t) . sum_s phi(k_s)      s <= t where causal

Source: Katharopoulos et al., "Transformers are RNNs", eqs. 5 and 9. A column of ones beside the
values turns the numerator and the normaliser into one sum, the state (F V+1).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.core import masks
from attnjax.ops import decay_attention as decays
from attnjax.ops import state_masks

_LEAST = 1e-18  # a normaliser whose inverse square, in its gradient, is still a float32


def linear_attention(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B S N F"],
    v: Float[Array, "B S N V"],
    *,
    mask: masks.Mask | None = None,
    initial_state: Float[Array, "B N F V1"] | None = None,
    by: str = "linear_attention",
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N F V1"]]:
    """(o in v's dtype, final state in float32) of features q, k >= 0; O(T) time and memory.

    Args:
      mask: without Causal each query sees every key. With it T = S, in chunks. Also Valid, and,
        together with Causal, Segments of which each is one run of tokens.
      initial_state: of keys before these (V1 = V + 1), which every query (of the first segment)
        sees; None is none.
      by: who asks, for error messages.

    A normaliser below 1e-18 counts as nothing seen: the output is zero, and so are its gradients.
    Raises NotImplementedError for masks that can't be honoured.
    """
    causal, valid, segments = masks.select(mask, masks.Causal, masks.Valid, masks.Segments, by=by)
    if segments and not causal:
        raise NotImplementedError(f"{by} can honour Segments only together with Causal")
    dtype, (q, k, v) = v.dtype, (x.astype(jnp.float32) for x in (q, k, v))
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
    if causal:
        no_decay = jnp.zeros(q.shape[2])
        options = dict(mask=mask, initial_state=initial_state, implementation="xla", by=by)
        o, state = decays.decay_attention(q, k, v, no_decay, **options)
    else:
        state = jnp.einsum("BSNF,BSNV->BNFV", state_masks.only_valid(k, valid), v)
        if initial_state is not None:
            state = state + initial_state
        o = jnp.einsum("BTNF,BNFV->BTNV", q, state)
    return _normalise(o[..., :-1], o[..., -1:]).astype(dtype), state


def _normalise(o, total):
    seen = total >= _LEAST
    return jnp.where(seen, o / jnp.where(seen, total, 1.0), 0.0)
