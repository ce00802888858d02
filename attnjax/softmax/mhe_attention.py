r"""MHE attention: heads share their projections and differ by embeddings alone.

Paper: Xue and Aletras, "Pit One Against Many: Leveraging Attention-head Embeddings for
Parameter-efficient Multi-head Attention", arXiv:2310.07911, section 3, MHE-Mul and MHE-Add.

    head_n = softmax(psi(Q, a_n) psi(K, b_n)^T / sqrt(H)) psi(V, c_n)
    y      = sum_n head_n P_o,n,         Q = x P_q,  K = x P_k,  V = x P_v  of all heads

    mul:  psi(X, e) = X * (e + 1)            add:  psi(X, e) = X + e

No key and no value of a single head is ever made: with the weights W_n,

    mul:  psi(q, a_n) . psi(k, b_n) = (q * (a_n + 1) * (b_n + 1)) . k,   head_n = W_n V * (c_n + 1)
    add:  psi(q, a_n) . psi(k, b_n) = (q + a_n) . k + (q + a_n) . b_n,   head_n = W_n V + c_n

where softmax doesn't see the last product, one for all keys. So this is multi-query attention
whose queries and outputs are changed for each head, with its cache for one head.

Shapes: B batch, T queries, S keys, N heads, H head dim, V value dim, D model dim.
Unlike the paper: in the form "add" the module has no b_n, which would do nothing; the projections
have no biases; positions are left to the model.
"""

from collections.abc import Callable
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnjax.core import decode, layers, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops

Form = Literal["mul", "add"]


def mhe_attention(
    q: Float[Array, "B T 1 H"],
    k: Float[Array, "B S 1 H"],
    v: Float[Array, "B S 1 V"],
    query_embedding: Float[Array, "N H"],
    key_embedding: Float[Array, "N H"] | None,
    value_embedding: Float[Array, "N V"],
    *,
    form: Form = "mul",
    mask: masks.Mask | None = None,
    score_mod: Callable[..., jax.Array] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """Attention of N heads to one head of keys and values, in v's dtype.

    Args:
      query_embedding, key_embedding, value_embedding: a, b and c. None is zero. In the form "add"
        key_embedding moves all scores of a query alike, so it has no effect and no gradient.
      form: of psi.

    The other options are those of `ops.dot_product_attention`. Raises ValueError for another form.
    """
    if form not in get_args(Form):
        raise ValueError(f"{form=} must be one of {get_args(Form)}")
    q = _psi(q, query_embedding, form)
    if form == "mul" and key_embedding is not None:
        q = _psi(q, key_embedding, form)
    options = dict(mask=mask, score_mod=score_mod, q_offset=q_offset, return_lse=True)
    attend = ops.dot_product_attention
    o, lse = attend(q.astype(k.dtype), k, v, implementation=implementation, **options)
    sees = lse[..., None] > -jnp.inf  # nothing seen is zero, without an embedding
    return jnp.where(sees, _psi(o, value_embedding, form), 0.0).astype(v.dtype)


def _psi(x, embedding, form):
    """(B T 1|N H) and (N H) -> (B T N H) in float32."""
    x, e = x.astype(jnp.float32), embedding.astype(jnp.float32)[None, None]
    return x * (e + 1) if form == "mul" else x + e


class MheAttention(nn.Module):
    """Section 3 over (B T D): 3 D H weights and 3 N H embeddings ("add": 2 N H) before P_o.

    Embeddings begin with a deviation of 1: with 0.02 the heads begin as one, and may stay so.
    """

    num_heads: int
    head_dim: int
    form: Form = "mul"
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = mhe_attention

    def setup(self):
        embedding = (self.num_heads, self.head_dim), nn.initializers.normal(1.0)
        self.query = layers.HeadProjection(1, self.head_dim, self.dtype)
        self.key = layers.HeadProjection(1, self.head_dim, self.dtype)
        self.value = layers.HeadProjection(1, self.head_dim, self.dtype)
        self.query_embedding = layers.Table(*embedding)
        if self.form == "mul":
            self.key_embedding = layers.Table(*embedding)
        self.value_embedding = layers.Table(*embedding)
        self.attend = layers.Attend(self.fn)
        self.out = layers.OutputProjection(self.dtype)

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says what each token sees."""
        return self._attend(x, self.key(x), self.value(x), mask=mask)

    def init_state(self, batch: int, length: int) -> decode.KVCache:
        """An empty cache for `length` tokens: one key and one value of each, for all heads."""
        H = self.head_dim
        return decode.KVCache.empty(batch, length, 1, H, H, self.dtype or jnp.float32)

    def extend(
        self, state: decode.KVCache, x: Float[Array, "B T D"]
    ) -> tuple[decode.KVCache, Float[Array, "B T D"]]:
        """The next T tokens, each of which sees those before it and itself."""
        cache = state.append(self.key(x), self.value(x))
        causal = dict(mask=masks.Causal(), q_offset=state.length)
        return cache, self._attend(x, cache.k, cache.v, **causal)

    def _attend(self, x, k, v, **options):
        key = self.key_embedding() if self.form == "mul" else None
        embeddings = self.query_embedding(), key, self.value_embedding()
        o = self.attend(self.query(x), k, v, *embeddings, form=self.form, **options)
        return self.out(o, x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 1, 8))
    names = "query_embedding", "key_embedding", "value_embedding"
    embeddings = jax.random.normal(jax.random.fold_in(key, 1), (3, 4, 8)) / 2
    return dict(q=q, k=k, v=v) | dict(zip(names, embeddings, strict=True))


def _oracle(q, k, v, query_embedding, key_embedding, value_embedding, *, form="mul", mask=None):
    heads = []
    for n in range(len(query_embedding)):
        a, b, c = query_embedding[n], key_embedding[n], value_embedding[n]
        psi = (lambda x, e: x * (e + 1)) if form == "mul" else (lambda x, e: x + e)
        qn, kn, vn = (psi(x[:, :, 0], e[None, None]) for x, e in ((q, a), (k, b), (v, c)))
        x = qn @ kn.mT / jnp.sqrt(q.shape[-1])
        x = jnp.where(masks.dense(mask, *x.shape[1:])[:, 0], x, -1e30)
        heads.append(jax.nn.softmax(x) @ vn)
    return jnp.stack(heads, 2)


SPEC = registry.Mechanism(
    fn=mhe_attention,
    module=MheAttention,
    small=dict(num_heads=4, head_dim=8),
    papers=("mhe-attention",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(mask=masks.Causal()), dict(mask=masks.Causal(), form="add")),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.CROSS,
            Claim.PERMUTATION_EQUIVARIANT,
            Claim.STREAMABLE,
            Claim.LINEAR_MEMORY,
            Claim.CONTEXT_PARALLEL,
            Claim.FORWARD_MODE,
        }
    ),
    context=("gather",),
)
