r"""Multi-head attention: each head attends with queries, keys and values of its own.

Paper: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, eq. 1 and section 3.2.2.

    head_n = softmax(Q_n K_n^T / sqrt(H)) V_n,      Q_n = x P_q,n,  K_n = x P_k,n,  V_n = x P_v,n
    y      = sum_n head_n P_o,n

Shapes: B batch, T queries, S keys, N heads, H head dim, V value dim, D model dim.
Unlike the paper: the projections have no biases; positions are a rotation of queries and keys
(`rotary_base`) or are left to the model; dropout of weights is an option of the function.
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


def multi_head_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N V"],
    *,
    mask: masks.Mask | None = None,
    score_mod: Callable[..., jax.Array] | None = None,
    dropout: dropouts.Dropout | None = None,
    q_offset: int | Int[Array, ""] = 0,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """Eq. 1 for each head, with scale 1/sqrt(H). Options: `ops.dot_product_attention`."""
    attend = functools.partial(ops.dot_product_attention, implementation=implementation)
    return attend(q, k, v, mask=mask, score_mod=score_mod, dropout=dropout, q_offset=q_offset)


class MultiHeadAttention(paged_attention.PagedKeyValueAttention):
    """Section 3.2.2 over (B T D)."""

    fn: Callable[..., jax.Array] = multi_head_attention
    paged_fn: Callable[..., jax.Array] = decode_attention.decode_attention


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k, v=v)


def _oracle(q, k, v, *, mask=None):
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    x = jnp.where(masks.dense(mask, q.shape[1], k.shape[1]), x, -1e30)
    return jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(x), v)


SPEC = registry.Mechanism(
    fn=multi_head_attention,
    module=MultiHeadAttention,
    small=dict(num_heads=4, head_dim=8),
    papers=(),  # older than the catalogue
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
