r"""Multi-query attention: many heads of queries, one head of keys and values.

Paper: Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need", arXiv:1911.02150,
sections 3 and 3.1 (incremental form).

    head_n = softmax(Q_n K^T / sqrt(H)) V,      Q_n = x P_q,n,  K = x P_k,  V = x P_v
    y      = sum_n head_n P_o,n

The cache of keys and values is N times smaller than that of multi-head attention, and so is what
a step of decoding reads.

Shapes: B batch, T queries, S keys, N heads, H head dim, V value dim, D model dim.
Unlike the paper: scores are scaled by 1/sqrt(H), which its listings leave out;
positions are a rotation (`rotary_base`) or are left to the model.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnjax.core import masks, paged_attention, registry
from attnjax.core.registry import Claim
from attnjax.ops import decode_attention
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import dropout as dropouts


def multi_query_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S 1 H"],
    v: Float[Array, "B S 1 V"],
    *,
    mask: masks.Mask | None = None,
    score_mod: Callable[..., jax.Array] | None = None,
    dropout: dropouts.Dropout | None = None,
    q_offset: int | Int[Array, ""] = 0,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """Section 3, with scale 1/sqrt(H). Options: `ops.dot_product_attention`."""
    attend = functools.partial(ops.dot_product_attention, implementation=implementation)
    return attend(q, k, v, mask=mask, score_mod=score_mod, dropout=dropout, q_offset=q_offset)


class MultiQueryAttention(paged_attention.PagedKeyValueAttention):
    """Attention over (B T D) with one head of keys and values; other `num_kv_heads` raise."""

    num_kv_heads: int | None = 1
    fn: Callable[..., jax.Array] = multi_query_attention
    paged_fn: Callable[..., jax.Array] = decode_attention.decode_attention

    def setup(self):
        if self.num_kv_heads != 1:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must be 1; gqa takes more")
        super().setup()


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k[:, :, :1], v=v[:, :, :1])


def _oracle(q, k, v, *, mask=None):
    x = jnp.einsum("BTNH,BSH->BNTS", q, k[:, :, 0]) / jnp.sqrt(q.shape[-1])
    x = jnp.where(masks.dense(mask, *x.shape[2:]), x, -1e30)
    return jnp.einsum("BNTS,BSV->BTNV", jax.nn.softmax(x), v[:, :, 0])


SPEC = registry.Mechanism(
    fn=multi_query_attention,
    module=MultiQueryAttention,
    small=dict(num_heads=4, head_dim=8),
    papers=("multi-query-attention",),
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
            Claim.DENSE_TWIN,
            Claim.LINEAR_MEMORY,
            Claim.CONTEXT_PARALLEL,
            Claim.FORWARD_MODE,
        }
    ),
    context=("ring", "gather", "all_to_all", "all_to_all_ring", "ring_self_attention", "halo"),
)
