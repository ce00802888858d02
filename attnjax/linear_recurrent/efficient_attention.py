r"""Efficient attention: keys sum the values up into a few contexts, which queries then mix.

Paper: Shen et al., "Efficient Attention: Attention with Linear Complexities", arXiv:1812.01243,
sections 3.2 and 3.3.

    G = rho_k(K)^T V                     H contexts, each a sum of all values
    O = rho_q(Q) G                       each query reads them
    softmax:  rho_q over the H channels of a query, rho_k over the S positions of a channel
    scaling:  rho_q(Q) = Q / sqrt(S),  rho_k(K) = K / sqrt(S)

Scaling is dot-product attention with weights Q K^T / S, exactly: only the order of the products
differs. Softmax approximates its softmax: the weights rho_q(Q) rho_k(K)^T are positive and those of
a query sum to 1, too. Either way the cost is linear in T and S. Every output depends on all keys,
so there is no causal form.

Shapes: B batch, T queries, S keys, N heads, H head dim, V value dim, D model dim.
Unlike the paper: positions come as one sequence, in any order; the residual connection is left to
the model, and the projections have no biases. Padded keys count neither in a softmax nor in S.
"""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import layers, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import state_masks

Normalizer = Literal["softmax", "scaling"]


def efficient_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N V"],
    *,
    normalizer: Normalizer = "softmax",
    mask: masks.Mask | None = None,
) -> Float[Array, "B T N V"]:
    """o in v's dtype, computed in float32 with O(T + S) time and memory.

    Args:
      normalizer: rho, "softmax" or "scaling".
      mask: Valid, or None.

    Raises ValueError for another normalizer and NotImplementedError for other masks.
    """
    if normalizer not in get_args(Normalizer):
        raise ValueError(f"{normalizer=} must be one of {get_args(Normalizer)}")
    (valid,) = masks.select(mask, masks.Valid, by="efficient_attention")
    dtype, (q, k, v) = v.dtype, (x.astype(jnp.float32) for x in (q, k, v))
    seen = state_masks.only_valid(jnp.ones_like(k[..., :1]), valid)
    normalize = {"softmax": by_softmax, "scaling": by_scaling}[normalizer]
    q, k = normalize(q, k, seen)
    contexts = jnp.einsum("BSNH,BSNV->BNHV", k, v)
    return jnp.einsum("BTNH,BNHV->BTNV", q, contexts).astype(dtype)


def by_softmax(
    q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], seen: Float[Array, "B S N 1"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"]]:
    """rho_q(q) sums to 1 over channels, rho_k(k) over the positions where `seen` is 1."""
    return jax.nn.softmax(q), jax.nn.softmax(jnp.where(seen > 0, k, -1e30), axis=1) * seen


def by_scaling(
    q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], seen: Float[Array, "B S N 1"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"]]:
    """Both divided by the root of the number of positions where `seen` is 1."""
    root = jnp.sqrt(jnp.maximum(seen.sum(1, keepdims=True), 1.0))
    return q / root, k * seen / root


class EfficientAttention(nn.Module):
    """Multi-head efficient attention over (B T D)."""

    num_heads: int
    head_dim: int
    normalizer: Normalizer = "softmax"
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = efficient_attention

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says which tokens are valid."""
        heads = functools.partial(layers.HeadProjection, self.num_heads, self.head_dim, self.dtype)
        q, k, v = (heads(name=name)(x) for name in ("query", "key", "value"))
        attend = layers.Attend(self.fn, name="attend")
        o = attend(q, k, v, normalizer=self.normalizer, mask=mask)
        return layers.OutputProjection(self.dtype, name="out")(o, x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k, v=v)


def _oracle(q, k, v, *, normalizer="softmax"):
    S = k.shape[1]
    if normalizer == "softmax":
        q = jnp.exp(q) / jnp.exp(q).sum(-1, keepdims=True)
        k = jnp.exp(k) / jnp.exp(k).sum(1, keepdims=True)
        w = jnp.einsum("BTNH,BSNH->BNTS", q, k)
    else:
        w = jnp.einsum("BTNH,BSNH->BNTS", q, k) / S
    return jnp.einsum("BNTS,BSNV->BTNV", w, v)


SPEC = registry.Mechanism(
    fn=efficient_attention,
    module=EfficientAttention,
    small=dict(num_heads=4, head_dim=8),
    papers=("efficient-attention",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(normalizer="scaling")),
    claims=frozenset(
        {
            Claim.MASKABLE,
            Claim.CROSS,
            Claim.PERMUTATION_EQUIVARIANT,
            Claim.LINEAR_MEMORY,
            Claim.LINEAR_COMPUTE,
            Claim.CONTEXT_PARALLEL,
            Claim.DENSE_TWIN,
            Claim.FORWARD_MODE,
        }
    ),
    context=("all_to_all",),
)
