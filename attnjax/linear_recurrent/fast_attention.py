r"""FAST (Fastmax): softmax's exponential replaced by its Taylor polynomial, which factorises.

Paper: Gerami et al., "FAST: Factorizable Attention for Speeding up Transformers",
arXiv:2402.07901, section 2.

    o_t = sum_s f(z_ts) v_s / sum_s f(z_ts),     f(z) = 1 + z  or  1 + z + z^2 / 2
    z_ts = scale (q^_t . k^_s),      x^ = (x - mean(x)) / std(x)  over the H features of a token

    sum_s f(z_ts) v_s = M_0 + q^_t M_1 + (q^_t q^_t^T) : M_2
    M_0 = sum_s v_s,    M_1 = scale sum_s k^_s v_s^T,    M_2 = scale^2 / 2 sum_s k^_s k^_s^T v_s^T

The moments are sums over keys, so causal attention carries them as its state. M_2 is symmetric:
each product of two features is taken once, which leaves F = 1 + H + H (H + 1) / 2 features.
Time is O(T F V) and memory O(T F), with no matrix of queries and keys.

Shapes: B batch, T queries, S keys, N heads, H head dim, V value dim, D model dim, F features.
Unlike the paper: z is scaled by 1/H, so that |z| <= 1, where the polynomial is near exp and weights
of order 1 are not negative (the authors' code gets this bound by the largest norm of all tokens,
which no causal form can know); scale=1 is no scale. No dropout of features.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnjax.core import layers, masks, recurrent, registry
from attnjax.core.registry import Claim
from attnjax.ops import decay_attention as decays
from attnjax.ops import linear_attention as ops

Order = Literal[1, 2]


def fast_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N V"],
    *,
    order: Order = 2,
    scale: float | None = None,
    mask: masks.Mask | None = None,
    initial_state: Float[Array, "B N F V1"] | None = None,
    return_state: bool = False,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B N F V1"]]:
    """o in v's dtype, and with `return_state` also the final state in float32.

    Args:
      order: of the polynomial f.
      scale: of the products z, above 0; None is 1/H, which is the most that order 1 may have.
      mask: without Causal each query sees every key. Also Valid, and, together with Causal,
        Segments of which each is one run of tokens.
      initial_state: moments of the keys before these, of the V values and, last, of ones.

    Raises ValueError for order or scale out of range.
    """
    if order not in (1, 2):
        raise ValueError(f"{order=} must be 1 or 2")
    H = q.shape[-1]
    most = 1 / H if order == 1 else float("inf")
    scale = 1 / H if scale is None else scale
    if not 0 < scale <= most:
        raise ValueError(f"{scale=} must be above 0 and at most {most} for {order=} and {H=}")
    # products of features are f, hence not negative, though features may be
    features = (phi(x, order=order, scale=scale) for x in (q, k))
    options = dict(mask=mask, initial_state=initial_state, by="fast_attention")
    o, state = ops.linear_attention(*features, v, **options)
    return (o, state) if return_state else o


def phi(x: Float[Array, "B T N H"], *, order: Order, scale: float) -> Float[Array, "B T N F"]:
    """Features in float32 such that phi(q) . phi(k) = f(scale (q^ . k^))."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    # a token of equal features stays zero, and sees all keys alike
    x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale**0.5
    terms = [jnp.ones_like(x[..., :1]), x]
    if order == 2:
        i, j = np.triu_indices(x.shape[-1])
        share = np.where(i == j, 0.5**0.5, 1.0).astype(np.float32)  # of z^2 / 2
        terms.append(x[..., i] * x[..., j] * share[None, None, None])
    return jnp.concatenate(terms, -1)


class FastAttention(recurrent.Recurrent):
    """Multi-head attention over (B T D) with a polynomial in the place of exp."""

    order: Order = 2
    scale: float | None = None
    fn: Callable[..., jax.Array] = fast_attention

    def setup(self):
        N, H = self.num_heads, self.head_dim
        self.query = layers.HeadProjection(N, H, self.dtype)
        self.key = layers.HeadProjection(N, H, self.dtype)
        self.value = layers.HeadProjection(N, H, self.dtype)
        fn = functools.partial(self.fn, order=self.order, scale=self.scale)
        self.attend = layers.Attend(fn)
        self.out = layers.OutputProjection(self.dtype)

    def _memory(self, batch) -> Float[Array, "B N F V1"]:
        H = self.head_dim
        F = 1 + H + (H * (H + 1) // 2 if self.order == 2 else 0)
        return jnp.zeros((batch, self.num_heads, F, H + 1))

    def _project(self, x):
        return self.query(x), self.key(x), self.value(x)


def _carry(q, k, v, *, mask=None):
    """What an initial state is multiplied by until the last token."""
    return decays.carry(jnp.zeros(q.shape[2]), q.shape[1], mask=mask)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k, v=v)


def _oracle(q, k, v, *, order=2, scale=None, mask=None):
    hat = lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    z = jnp.einsum("BTNH,BSNH->BNTS", hat(q), hat(k)) * (scale or 1 / q.shape[-1])
    f = 1 + z + (z**2 / 2 if order == 2 else 0)
    f = jnp.where(masks.dense(mask, q.shape[1], k.shape[1]), f, 0)
    return jnp.einsum("BNTS,BSNV->BTNV", f / f.sum(-1, keepdims=True), v)


SPEC = registry.Mechanism(
    fn=fast_attention,
    module=FastAttention,
    small=dict(num_heads=4, head_dim=8),
    papers=("fast",),
    example=_example,
    oracle=_oracle,
    variants=(dict(mask=masks.Causal(), scale=1.0), dict(order=1)),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.CROSS,
            Claim.PERMUTATION_EQUIVARIANT,
            Claim.STREAMABLE,
            Claim.LINEAR_MEMORY,
            Claim.LINEAR_COMPUTE,
            Claim.CONTEXT_PARALLEL,
            Claim.DENSE_TWIN,
        }
    ),
    context=("pass_state", "all_to_all"),
    carry=_carry,
)
