r"""Gated DeltaNet: the delta rule over a state that fades as each token decides.

Paper: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv:2412.06464,
eq. 10 and section 3.4.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,      o_t = S_t^T q_t
    q, k = unit(silu(conv(x P))),  v = silu(conv(x P_v)),  beta = sigmoid(P_b x)
    alpha = exp(-rate softplus(P_a x + bias)),  y = P_o (rms_norm(o) * silu(P_g x))

alpha, one number for each head, clears the whole memory at once; beta replaces one entry. With
alpha = 1 it is DeltaNet; Mamba-2 is the same without the erasing k_t k_t^T.

Shapes: B batch, T time, N heads, H key dim, V value dim, D model dim; conv is causal and short, for
each channel by itself, and its last tokens are a part of the state.
Unlike the paper: V is H unless given (the paper's is 2H).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.core import layers, masks, recurrent, registry, short_conv
from attnjax.core.registry import Claim
from attnjax.ops import linear_recurrence as ops
from attnjax.ops import unit_vectors


def gated_delta_net(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    beta: Float[Array, "B T N"],
    log_decay: Float[Array, "B T N"],
    *,
    mask: masks.Mask | None = None,
    initial_state: Float[Array, "B N H V"] | None = None,
    return_state: bool = False,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
    """o in v's dtype, and with `return_state` also the final state in float32. Always causal.

    Args:
      k: of norm <= 1, lest the state grow without bound.
      beta: in [0, 2]; 1 replaces all that is stored under a key of norm 1.
      log_decay: log(alpha), finite and <= 0.
      mask: any of Causal, Valid, Segments. A padded token changes nothing. Where a segment (one
        run of tokens) begins the state is zero.
      initial_state: of the tokens before these, in the first segment.
    """
    options = dict(mask=mask, initial_state=initial_state, by="gated_delta_net")
    o, state = ops.linear_recurrence(q, k, v, log_decay=log_decay[..., None], beta=beta, **options)
    return (o, state) if return_state else o


def log_decays(
    z: Float[Array, "B T N"], log_rate: Float[Array, "N"], bias: Float[Array, "N"]
) -> Float[Array, "B T N"]:
    """log(alpha) in float32."""
    step = jax.nn.softplus(z.astype(jnp.float32) + bias[None, None])
    return -jnp.exp(log_rate)[None, None] * step


class GatedDeltaNet(recurrent.Recurrent):
    """The token mixer of section 3.4 over (B T D); value_dim None is head_dim."""

    value_dim: int | None = None
    conv_width: int = 4
    fn: Callable[..., jax.Array] = gated_delta_net

    def setup(self):
        N, H, V = self.num_heads, self.head_dim, self.value_dim or self.head_dim
        self.query = short_conv.ConvProjection(N, H, self.conv_width, self.dtype)
        self.key = short_conv.ConvProjection(N, H, self.conv_width, self.dtype)
        self.value = short_conv.ConvProjection(N, V, self.conv_width, self.dtype)
        self.beta = layers.Dense(N, use_bias=False, dtype=self.dtype)
        self.decay = layers.Dense(N, use_bias=False, dtype=self.dtype)
        self.log_rate = layers.Table((N,), _log_rates)
        self.decay_bias = layers.Table((N,), _biases)
        self.attend = layers.Attend(self.fn)
        self.norm = nn.RMSNorm(dtype=self.dtype)
        self.gate = layers.HeadProjection(N, V, self.dtype)
        self.out = layers.OutputProjection(self.dtype)

    def _memory(self, batch) -> Float[Array, "B N H V"]:
        H, V = self.head_dim, self.value_dim or self.head_dim
        return jnp.zeros((batch, self.num_heads, H, V))

    def _before(self, batch):
        return tuple(part.init_state(batch) for part in (self.query, self.key, self.value))

    def _project_after(self, x, before, mask):
        q, last_q = self.query(x, before[0], mask=mask)
        k, last_k = self.key(x, before[1], mask=mask)
        v, last_v = self.value(x, before[2], mask=mask)
        q, k, beta = unit_vectors.unit(q), unit_vectors.unit(k), nn.sigmoid(self.beta(x))
        log_decay = log_decays(self.decay(x), self.log_rate(), self.decay_bias())
        return (q, k, v, beta, log_decay), (last_q, last_k, last_v)

    def _gated(self, o, x):
        return self.norm(o) * nn.silu(self.gate(x))


def _log_rates(key, shape):
    """Rates drawn from 1 to 16, as in Mamba-2."""
    return jnp.log(jax.random.uniform(key, shape, minval=1, maxval=16))


def _biases(key, shape):
    """softplus(bias) drawn from 0.001 to 0.1, evenly in its logarithm, as in Mamba-2."""
    low, high = jnp.log(1e-3), jnp.log(1e-1)
    return jnp.log(jnp.expm1(jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))))


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 2)
    q, k, v = jax.random.normal(keys[0], (3, 2, T, 4, 8))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    beta, decay = jax.random.uniform(keys[1], (2, 2, T, 4))
    return dict(q=q, k=k, v=v, beta=beta, log_decay=-decay)


def _oracle(q, k, v, beta, log_decay, *, return_state=False):
    def step(state, x):
        q, k, v, beta, alpha = x
        erase = jnp.eye(k.shape[-1])[None, None] - beta[..., None, None] * _outer(k, k)
        state = alpha[..., None, None] * (erase.astype(v.dtype) @ state)
        state = state + beta[..., None, None] * _outer(k, v)
        return state, jnp.einsum("BNH,BNHV->BNV", q, state)

    xs = [x.swapaxes(0, 1) for x in (q, k, v, beta, jnp.exp(log_decay))]
    state, o = jax.lax.scan(step, jnp.zeros_like(_outer(k[:, 0], v[:, 0])), xs)
    return (o.swapaxes(0, 1), state) if return_state else o.swapaxes(0, 1)


def _outer(a, b):
    return a[..., :, None] * b[..., None, :]


SPEC = registry.Mechanism(
    fn=gated_delta_net,
    module=GatedDeltaNet,
    small=dict(num_heads=4, head_dim=8),
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
)
