r"""DeltaNet: linear attention that replaces what a key had stored instead of adding to it.

Paper: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
arXiv:2406.06484, sections 2.2, 3.1 and 3.3.

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,      o_t = S_t^T q_t
        = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
    q, k = unit(silu(conv(x P))),  v = silu(conv(x P_v)),  beta = sigmoid(P_b x)
    y    = P_o rms_norm(o)                                   a norm of each head

One step of gradient descent, of size beta, on |S^T k_t - v_t|^2 / 2. Chunks of tokens are a
triangular system (`ops.linear_recurrence`).

Shapes: B batch, T time, N heads, H key dim, V value dim, D model dim; conv is causal and short, for
each channel by itself, and its last tokens are a part of the state.
Unlike the paper: nothing known.
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


def delta_net(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    beta: Float[Array, "B T N"],
    *,
    mask: masks.Mask | None = None,
    initial_state: Float[Array, "B N H V"] | None = None,
    return_state: bool = False,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
    """o in v's dtype, and with `return_state` also the final state in float32. Always causal.

    Args:
      k: of norm <= 1, lest the state grow without bound.
      beta: in [0, 2]; 1 replaces all that is stored under a key of norm 1.
      mask: any of Causal, Valid, Segments. A padded token changes nothing. Where a segment (one
        run of tokens) begins the state is zero.
      initial_state: of the tokens before these, in the first segment.
    """
    options = dict(mask=mask, initial_state=initial_state, by="delta_net")
    o, state = ops.linear_recurrence(q, k, v, beta=beta, **options)
    return (o, state) if return_state else o


class DeltaNet(recurrent.Recurrent):
    """The token mixer of section 3.3 over (B T D); value_dim None is head_dim."""

    value_dim: int | None = None
    conv_width: int = 4
    fn: Callable[..., jax.Array] = delta_net

    def setup(self):
        N, H, V = self.num_heads, self.head_dim, self.value_dim or self.head_dim
        self.query = short_conv.ConvProjection(N, H, self.conv_width, self.dtype)
        self.key = short_conv.ConvProjection(N, H, self.conv_width, self.dtype)
        self.value = short_conv.ConvProjection(N, V, self.conv_width, self.dtype)
        self.beta = layers.Dense(N, use_bias=False, dtype=self.dtype)
        self.attend = layers.Attend(self.fn)
        self.norm = nn.RMSNorm(dtype=self.dtype)
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
        return (q, k, v, beta), (last_q, last_k, last_v)

    def _gated(self, o, x):
        return self.norm(o)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 2)
    q, k, v = jax.random.normal(keys[0], (3, 2, T, 4, 8))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    return dict(q=q, k=k, v=v, beta=jax.random.uniform(keys[1], (2, T, 4)))


def _oracle(q, k, v, beta, *, return_state=False):
    def step(state, x):
        q, k, v, beta = x
        erase = jnp.eye(k.shape[-1])[None, None] - beta[..., None, None] * _outer(k, k)
        state = erase.astype(v.dtype) @ state + beta[..., None, None] * _outer(k, v)
        return state, jnp.einsum("BNH,BNHV->BNV", q, state)

    xs = [x.swapaxes(0, 1) for x in (q, k, v, beta)]
    state, o = jax.lax.scan(step, jnp.zeros_like(_outer(k[:, 0], v[:, 0])), xs)
    return (o.swapaxes(0, 1), state) if return_state else o.swapaxes(0, 1)


def _outer(a, b):
    return a[..., :, None] * b[..., None, :]


SPEC = registry.Mechanism(
    fn=delta_net,
    module=DeltaNet,
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
