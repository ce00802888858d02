r"""Retention: attention whose weights fade exponentially with distance, in the place of a softmax.

Paper: Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models",
arXiv:2307.08621, eqs. 5 (parallel), 6 (recurrent), 7 (chunks) and 8 (gated, multi-scale).

    Q = (x P_q) Theta,  K = (x P_k) conj(Theta),  Theta_t = e^(i t theta)     rotation by position
    o_t = sum_{s <= t} gamma^(t - s) (q_t . k_s / sqrt(H)) v_s
    S_t = gamma S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(H)              the same, recurrent
    y   = P_o (swish(x P_g) * group_norm(o)),   gamma_n = 1 - 2^(-5 - n) in head n

Shapes: B batch, T time, N heads, H key dim, V value dim, D model dim.
Unlike the paper: the sums of weights are not normalised, which a norm of each head makes no
difference to; V is H unless given (the paper's is 2H).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnjax.core import layers, masks, positions, recurrent, registry
from attnjax.core.registry import Claim
from attnjax.ops import decay_attention as ops
from pallas_kernels import decay_attention as kernels


def retention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    log_decay: Float[Array, "N"],
    *,
    mask: masks.Mask | None = None,
    initial_state: Float[Array, "B N H V"] | None = None,
    return_state: bool = False,
    implementation: kernels.Implementation | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
    """o in v's dtype, and with `return_state` also the final state in float32. Always causal.

    Args:
      log_decay: log(gamma) <= 0, a constant: it has no gradient.
      mask: any of Causal, Valid, Segments. A padded key adds nothing, but time passes: the state
        decays there as elsewhere. Where a segment (one run of tokens) begins the state is zero.
      initial_state: of the tokens before these, in the first segment.
      implementation: "xla", "pallas" (TPU, Hopper) or "interpret"; None chooses by platform.
    """
    o, state = ops.decay_attention(
        q * q.shape[-1] ** -0.5,
        k,
        v,
        log_decay,
        mask=mask,
        initial_state=initial_state,
        implementation=implementation,
        by="retention",
    )
    return (o, state) if return_state else o


def log_decays(num_heads: int) -> Float[Array, "N"]:
    """log(gamma) of each head, eq. 8."""
    return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(num_heads))))


class Retention(recurrent.Recurrent):
    """Gated multi-scale retention, eq. 8, over (B T D); value_dim None is head_dim."""

    value_dim: int | None = None
    rotary_base: float = 10_000.0
    fn: Callable[..., jax.Array] = retention

    def setup(self):
        N, H, V = self.num_heads, self.head_dim, self.value_dim or self.head_dim
        self.query = layers.HeadProjection(N, H, self.dtype)
        self.key = layers.HeadProjection(N, H, self.dtype)
        self.value = layers.HeadProjection(N, V, self.dtype)
        self.gate = layers.HeadProjection(N, V, self.dtype)
        self.attend = layers.Attend(self.fn)
        self.norm = nn.LayerNorm(use_scale=False, use_bias=False, dtype=self.dtype)  # of each head
        self.out = layers.OutputProjection(self.dtype)

    def _memory(self, batch) -> Float[Array, "B N H V"]:
        H, V = self.head_dim, self.value_dim or self.head_dim
        return jnp.zeros((batch, self.num_heads, H, V))

    def _before(self, batch) -> Int[Array, ""]:
        return jnp.zeros((), jnp.int32)  # how many tokens

    def _project_after(self, x, before, mask):
        at = before + jnp.arange(x.shape[1])
        rotate = lambda x: positions.rotary(x, at, base=self.rotary_base)
        q, k, v = rotate(self.query(x)), rotate(self.key(x)), self.value(x)
        return (q, k, v, log_decays(self.num_heads)), before + x.shape[1]

    def _gated(self, o, x):
        return nn.swish(self.gate(x)) * self.norm(o)


def _carry(q, k, v, log_decay, *, mask=None):
    """What an initial state is multiplied by until the last token."""
    return ops.carry(log_decay, q.shape[1], mask=mask)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 16))
    return dict(q=q, k=k, v=v, log_decay=log_decays(4))


def _oracle(q, k, v, log_decay, *, mask=None, return_state=False):
    t = jnp.arange(q.shape[1])
    power = jax.lax.stop_gradient(log_decay)[:, None, None] * (t[:, None] - t[None, :])[None]
    causal = masks.Causal() if mask is None else mask & masks.Causal()
    decay = jnp.where(masks.dense(causal, len(t), len(t)), jnp.exp(power)[None], 0)  # B N T S
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    o = jnp.einsum("BNTS,BSNV->BTNV", scores * decay, v)
    state = jnp.einsum("BNS,BSNH,BSNV->BNHV", decay[:, :, -1], k, v)
    return (o, state) if return_state else o


SPEC = registry.Mechanism(
    fn=retention,
    module=Retention,
    small=dict(num_heads=4, head_dim=8),
    papers=("hybrid-linear-study",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(mask=masks.Causal()), dict(return_state=True)),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.STREAMABLE,
            Claim.LINEAR_MEMORY,
            Claim.LINEAR_COMPUTE,
            Claim.FUSED,
            Claim.CONTEXT_PARALLEL,
            Claim.DENSE_TWIN,
        }
    ),
    context=("pass_state", "all_to_all"),
    carry=_carry,
)
