r"""NAP, normalized attention pooling: scores are standardised over the keys, without a softmax.

Paper: Richter and Wattenhofer, "Normalized Attention Without Probability Cage", arXiv:2005.09561;
eps, the parameters by head and what follows the sum over keys are those of the authors' code.

    w_ts = g (x_ts - mean_s x_ts) / sqrt(var_s x_ts + eps) + b,        x_ts = q_t . k_s
    o_t  = sum_s w_ts v_s                                     over the n keys s that t sees
    y    = GELU(LayerNorm(o)) P_o                             the norm over all heads of a token

Weights may be negative, so an output may lie outside the convex hull of the values.

But for the deviation, weights are linear in the scores, so this is linear attention: from
A = sum_s (k_s - mean k) [k_s - mean k, v_s - mean v]^T, of size (H H+V), come

    n var_s x_ts = q_t^T A_k q_t,        sum_s (x_ts - mean_s x_ts) v_s = A_v^T q_t

and where t sees the keys up to its own, A needs no difference of large sums (Welford):

    A_n = A_{n-1} + n / (n - 1) (k_n - mean k) [k_n - mean k, v_n - mean v]^T    means of n keys

Shapes: B batch, T queries, S keys, N heads, H head dim, V value dim, D model dim.
Unlike the paper: its code adds sqrt(eps) to the deviation, whose gradient is infinite for one key;
the projections have no biases.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.core import layers, masks, recurrent, registry
from attnjax.core.registry import Claim
from attnjax.ops import decay_attention as decays
from attnjax.ops import state_masks

_EPS = 1e-6


class Moments(NamedTuple):
    """What is kept of the keys and values seen, in float32. U = H + V."""

    sums: Float[Array, "B N 1 U1"]  # of keys, of values, and their number
    products: Float[Array, "B N H U"]  # A


def nap(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N V"],
    gain: Float[Array, "N"],
    bias: Float[Array, "N"],
    *,
    mask: masks.Mask | None = None,
    initial_state: Moments | None = None,
    return_state: bool = False,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Moments]:
    """o in v's dtype, and with `return_state` also the final state; O(T) time and memory.

    Args:
      gain, bias: g and b.
      mask: without Causal each query sees every key. Also Valid, and, together with Causal (where
        T = S), Segments of which each is one run of tokens.
      initial_state: of keys before these, for the first segment; it needs Causal.

    Raises NotImplementedError for masks that can't be honoured, and ValueError for an initial
    state without Causal.
    """
    causal, *_ = masks.select(mask, masks.Causal, masks.Valid, masks.Segments, by="nap")
    if initial_state is not None and not causal:
        raise ValueError(f"an initial_state needs a causal mask, which {mask=} is not")
    dtype, H, state = v.dtype, k.shape[-1], initial_state or Moments(None, None)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    add_up = functools.partial(_add_up, mask=mask)
    both, ones = jnp.concatenate([k, v], -1), jnp.ones_like(k[..., :1])
    totals, sums = add_up(ones, ones, jnp.concatenate([both, ones], -1), state.sums)
    if not causal:
        totals = totals[:, :1]  # are those of every query
    count = jnp.maximum(totals[..., -1:], 1.0)
    deviation = both - totals[..., :-1] / count
    if causal:
        deviation = deviation * jnp.sqrt(count / jnp.maximum(count - 1, 1.0))
    o, products = add_up(q, deviation[..., :H], deviation, state.products)
    variance = jnp.maximum(jnp.sum(q * o[..., :H], -1, keepdims=True) / count, 0.0)
    gain, bias = (x.astype(jnp.float32)[None, None, :, None] for x in (gain, bias))
    o = gain * o[..., H:] * jax.lax.rsqrt(variance + _EPS) + bias * totals[..., H:-1]
    return (o.astype(dtype), Moments(sums, products)) if return_state else o.astype(dtype)


def _add_up(q, k, u, state, *, mask):
    """(sum_s (q_t . k_s) u_s, the state sum_s k_s u_s^T) over the keys that t sees."""
    causal, valid, segments = masks.select(
        mask, masks.Causal, masks.Valid, masks.Segments, by="nap"
    )
    if causal:
        options = dict(mask=mask, initial_state=state, implementation="xla", by="nap")
        return decays.decay_attention(q, k, u, jnp.zeros(q.shape[2]), **options)
    if segments:
        raise NotImplementedError("nap can honour Segments only together with Causal")
    state = jnp.einsum("BSNF,BSNU->BNFU", state_masks.only_valid(k, valid), u)
    return jnp.einsum("BTNF,BNFU->BTNU", q, state), state


class Nap(recurrent.Recurrent):
    """Multi-head NAP over (B T D), with the authors' norm and GELU before P_o."""

    fn: Callable[..., jax.Array] = nap

    def setup(self):
        N, H = self.num_heads, self.head_dim
        self.query = layers.HeadProjection(N, H, self.dtype)
        self.key = layers.HeadProjection(N, H, self.dtype)
        self.value = layers.HeadProjection(N, H, self.dtype)
        self.gain = layers.Table((N,), nn.initializers.ones)
        self.bias = layers.Table((N,), nn.initializers.zeros)
        self.attend = layers.Attend(self.fn)
        heads = -2, -1
        self.norm = nn.LayerNorm(reduction_axes=heads, feature_axes=heads, dtype=self.dtype)
        self.out = layers.OutputProjection(self.dtype)

    def _memory(self, batch) -> Moments:
        B, N, H = batch, self.num_heads, self.head_dim
        return Moments(jnp.zeros((B, N, 1, 2 * H + 1)), jnp.zeros((B, N, H, 2 * H)))

    def _project(self, x):
        return self.query(x), self.key(x), self.value(x), self.gain(), self.bias()

    def _gated(self, o, x):
        return nn.gelu(self.norm(o))


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    gain, bias = jax.random.normal(key, (2, 4)) / 2 + 1
    return dict(q=q, k=k, v=v, gain=gain, bias=bias)


def _oracle(q, k, v, gain, bias, *, mask=None):
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k)
    seen = jnp.broadcast_to(masks.dense(mask, *x.shape[2:]), x.shape)
    mean = jnp.mean(x, -1, keepdims=True, where=seen)
    variance = jnp.var(x, -1, keepdims=True, where=seen)
    w = (x - mean) / jnp.sqrt(variance + 1e-6)
    w = gain[None, :, None, None] * w + bias[None, :, None, None]
    return jnp.einsum("BNTS,BSNV->BTNV", jnp.where(seen, w, 0), v)


SPEC = registry.Mechanism(
    fn=nap,
    module=Nap,
    small=dict(num_heads=4, head_dim=8),
    papers=("nap",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(mask=masks.Causal())),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.CROSS,
            Claim.PERMUTATION_EQUIVARIANT,
            Claim.STREAMABLE,
            Claim.LINEAR_MEMORY,
            Claim.LINEAR_COMPUTE,
            Claim.DENSE_TWIN,
            Claim.CONTEXT_PARALLEL,
        }
    ),
    context=("all_to_all",),
)
