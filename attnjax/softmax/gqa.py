r"""Grouped-query attention: the query heads of a group share one key head and one value head.

Paper: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
Checkpoints", arXiv:2305.13245, sections 2.1 (conversion of a checkpoint) and 2.2 (groups).

    head_n = softmax(Q_n K_g^T / sqrt(H)) V_g,      g = floor(n / G),  G = N / K
    P_k,g  = mean over n in group g of the multi-head P_k,n, and likewise P_v,g      (conversion)

K = N is multi-head attention and K = 1 is multi-query attention. Only K heads of keys and values
are ever in memory, in training and in the cache.

Shapes: B batch, T queries, S keys, N heads, K kv-heads, H head dim, V value dim, D model dim.
Unlike the paper: a T5 has relative biases of the scores and no 1/sqrt(H); here positions are a
rotation (`rotary_base`) or are left to the model.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from attnjax.core import masks, paged_attention, registry
from attnjax.core.registry import Claim
from attnjax.ops import decode_attention
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import dropout as dropouts


def gqa(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: masks.Mask | None = None,
    score_mod: Callable[..., jax.Array] | None = None,
    dropout: dropouts.Dropout | None = None,
    q_offset: int | Int[Array, ""] = 0,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """Section 2.2, with scale 1/sqrt(H). Options: `ops.dot_product_attention`.

    Raises ValueError where N is no multiple of K.
    """
    attend = functools.partial(ops.dot_product_attention, implementation=implementation)
    return attend(q, k, v, mask=mask, score_mod=score_mod, dropout=dropout, q_offset=q_offset)


class GQA(paged_attention.PagedKeyValueAttention):
    """Attention over (B T D) with `num_kv_heads` heads of keys and values."""

    fn: Callable[..., jax.Array] = gqa
    paged_fn: Callable[..., jax.Array] = decode_attention.decode_attention


def mean_pool_heads(params: PyTree, *, num_kv_heads: int) -> PyTree:
    """Parameters of multi-head attention, anywhere in a tree, as those of GQA (section 2.1).

    Key and value projections (... D N H) become (... D K H), the mean over each group of heads;
    other leaves stay. Raises ValueError where there is no such projection or N is no multiple of
    num_kv_heads.
    """
    pooled = []

    def convert(path, leaf):
        names = [getattr(entry, "key", None) for entry in path]
        if names[-3:] not in (["key", "heads", "kernel"], ["value", "heads", "kernel"]):
            return leaf
        *lead, N, H = leaf.shape
        if num_kv_heads < 1 or N % num_kv_heads:
            raise ValueError(f"{num_kv_heads=} must divide the {N} heads of {'/'.join(names)}")
        pooled.append(names)
        return leaf.reshape(*lead, num_kv_heads, -1, H).mean(-2)

    params = jax.tree.map_with_path(convert, params)
    if not pooled:
        raise ValueError("params must have key/heads/kernel and value/heads/kernel somewhere")
    return params


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k[:, :, :2], v=v[:, :, :2])


def _oracle(q, k, v, *, mask=None):
    heads = []
    for n in range(q.shape[2]):
        g = n // (q.shape[2] // k.shape[2])
        x = jnp.einsum("BTH,BSH->BTS", q[:, :, n], k[:, :, g]) / jnp.sqrt(q.shape[-1])
        x = jnp.where(masks.dense(mask, *x.shape[1:])[:, 0], x, -1e30)
        heads.append(jnp.einsum("BTS,BSV->BTV", jax.nn.softmax(x), v[:, :, g]))
    return jnp.stack(heads, 2)


SPEC = registry.Mechanism(
    fn=gqa,
    module=GQA,
    small=dict(num_heads=4, head_dim=8, num_kv_heads=2),
    papers=("gqa",),
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
