r"""Gated linear attention: a state in which each key channel fades as each token decides.

Paper: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training",
arXiv:2312.06635, eq. 3 and sections 4.1 and 4.4.

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,       o_t = S_t^T q_t
    alpha_t = sigmoid(W_2 W_1 x_t + b)^(1/16)      W_1 (R D), W_2 (N H R): a gate of low rank
    y = P_o (norm(o) * swish(P_r x))               a norm of each head

Shapes: B batch, T time, N heads, H key dim, V value dim, D model dim, R rank of the gate.
Unlike the paper: the norm is an RMSNorm and the output gate has no bias, as in the authors' code;
V is H unless given (the paper's is 2H). Arguments and states are as in `ops.linear_recurrence`,
where the chunks of section 4 are.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.core import layers, masks, recurrent, registry
from attnjax.core.registry import Claim
from attnjax.ops import linear_recurrence as ops


def gated_linear_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    log_decay: Float[Array, "B T N H"],
    *,
    mask: masks.Mask | None = None,
    initial_state: Float[Array, "B N H V"] | None = None,
    return_state: bool = False,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
    """o in v's dtype, and with `return_state` also the final state in float32. Always causal.

    Args:
      log_decay: log(alpha), finite and <= 0.
      mask: any of Causal, Valid, Segments. A padded token changes nothing. Where a segment (one
        run of tokens) begins the state is zero.
      initial_state: of the tokens before these, in the first segment.
    """
    options = dict(mask=mask, initial_state=initial_state, by="gated_linear_attention")
    o, state = ops.linear_recurrence(q, k, v, log_decay=log_decay, **options)
    return (o, state) if return_state else o


def log_decays(gate: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """log(alpha) in float32: the root keeps alpha near 1, so that memories may be long."""
    return jax.nn.log_sigmoid(gate.astype(jnp.float32)) / 16


class GatedLinearAttention(recurrent.Recurrent):
    """Section 4.4 over (B T D); value_dim None is head_dim, gate_rank is R."""

    value_dim: int | None = None
    gate_rank: int = 16
    fn: Callable[..., jax.Array] = gated_linear_attention

    def setup(self):
        N, H, V = self.num_heads, self.head_dim, self.value_dim or self.head_dim
        self.query = layers.HeadProjection(N, H, self.dtype)
        self.key = layers.HeadProjection(N, H, self.dtype)
        self.value = layers.HeadProjection(N, V, self.dtype)
        self.decay_in = layers.Dense(self.gate_rank, use_bias=False, dtype=self.dtype)
        self.decay_out = layers.HeadProjection(N, H, self.dtype)
        self.decay_bias = layers.Table((N, H), nn.initializers.zeros)
        self.attend = layers.Attend(self.fn)
        self.norm = nn.RMSNorm(dtype=self.dtype)
        self.gate = layers.HeadProjection(N, V, self.dtype)
        self.out = layers.OutputProjection(self.dtype)

    def _memory(self, batch) -> Float[Array, "B N H V"]:
        H, V = self.head_dim, self.value_dim or self.head_dim
        return jnp.zeros((batch, self.num_heads, H, V))

    def _project(self, x):
        decay = self.decay_out(self.decay_in(x)) + self.decay_bias()[None, None]
        return self.query(x), self.key(x), self.value(x), log_decays(decay)

    def _gated(self, o, x):
        return self.norm(o) * nn.swish(self.gate(x))


def _carry(q, k, v, log_decay, *, mask=None):
    """What an initial state is multiplied by until the last token."""
    return ops.carry(log_decay, mask=mask)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v, gate = jax.random.normal(key, (4, 2, T, 4, 8))
    return dict(q=q, k=k, v=v, log_decay=log_decays(4 * gate))


def _oracle(q, k, v, log_decay, *, return_state=False):
    def step(state, x):
        q, k, v, log_decay = x
        state = jnp.exp(log_decay)[..., None] * state + k[..., :, None] * v[..., None, :]
        return state, jnp.einsum("BNH,BNHV->BNV", q, state)

    xs = [x.swapaxes(0, 1) for x in (q, k, v, log_decay)]
    state, o = jax.lax.scan(step, jnp.zeros_like(k[:, 0, ..., None] * v[:, 0, :, None]), xs)
    return (o.swapaxes(0, 1), state) if return_state else o.swapaxes(0, 1)


SPEC = registry.Mechanism(
    fn=gated_linear_attention,
    module=GatedLinearAttention,
    small=dict(num_heads=4, head_dim=8, gate_rank=4),
    papers=("hybrid-linear-study",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(return_state=True)),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.STREAMABLE,
            Claim.LINEAR_MEMORY,
            Claim.LINEAR_COMPUTE,
            Claim.CONTEXT_PARALLEL,
            Claim.DENSE_TWIN,
            Claim.FORWARD_MODE,
        }
    ),
    context=("pass_state", "all_to_all"),
    carry=_carry,
)
