r"""Neural attention: a small network, not a product, scores each pair of query and key.

Paper: DiGiugno and Mahmood, "Neural Attention: A Novel Mechanism for Enhanced Expressive Power in
Transformer Models", arXiv:2502.17206, section 3.

    x_ts = w_3 . relu(relu([q_t; k_s] W_1 + b_1) W_2 + b_2)
    o_t  = sum_s softmax_s(x_ts) v_s

q and k are reduced from H to P features before, and all heads share one network. Its first layer
is split, [q; k] W_1 = q A + k B, and applied to each token once. The rest is for each pair, and is
computed for a few queries at a time (and again in the backward pass): memory is O(S F).

Shapes: B batch, T queries, S keys, N heads, P reduced dim, P2 = 2P, V value dim, F and E hidden
layers, H head dim, D model dim.
Unlike the paper: two hidden layers, of P and P / 2, as in the authors' code, where the equation has
one; no bias in the last layer, which softmax would cancel. What it gains on text and images is
unknown here; the test shows a choice among keys that no product makes.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnjax.core import decode, layers, masks, registry
from attnjax.core.registry import Claim

_TOGETHER = 64  # queries that are scored at once


def neural_attention(
    q: Float[Array, "B T N P"],
    k: Float[Array, "B S N P"],
    v: Float[Array, "B S N V"],
    w1: Float[Array, "P2 F"],
    b1: Float[Array, "F"],
    w2: Float[Array, "F E"],
    b2: Float[Array, "E"],
    w3: Float[Array, "E"],
    *,
    mask: masks.Mask | None = None,
    q_offset: int | Int[Array, ""] = 0,
) -> Float[Array, "B T N V"]:
    """o in v's dtype; the network and softmax are computed in float32.

    Args:
      w1, b1: the first layer, over the features of a query and then those of a key.
      w2, b2, w3: the second layer, and the weights of the score.
      mask: any; a query that sees nothing gives zeros.
      q_offset: position of the first query.

    Raises ValueError where w1 has not 2P rows.
    """
    P, T, S = q.shape[-1], q.shape[1], k.shape[1]
    if len(w1) != 2 * P:
        raise ValueError(f"w1 {w1.shape} must have 2 * {P=} rows")
    exact = lambda *xs: [x.astype(jnp.float32) for x in xs]
    queries, keys, values = exact(q, k, v)
    w1, b1, w2, b2, w3 = exact(w1, b1, w2, b2, w3)
    queries, keys = queries @ w1[:P] + b1[None, None, None], keys @ w1[P:]

    def one(x):
        query, t = x  # B N F
        hidden = jax.nn.relu(query[:, None] + keys)  # B S N F
        hidden = jax.nn.relu(hidden @ w2 + b2[None, None, None])
        seen = masks.dense(mask, 1, S, q_offset=t)[:, :, 0]
        w = jax.nn.softmax((hidden @ w3).swapaxes(1, 2), where=seen)
        return jnp.einsum("BNS,BSNV->BNV", w, values)

    each = queries.swapaxes(0, 1), q_offset + jnp.arange(T)
    o = jax.lax.map(jax.checkpoint(one), each, batch_size=_TOGETHER)
    return o.swapaxes(0, 1).astype(v.dtype)


class NeuralAttention(nn.Module):
    """Multi-head attention over (B T D) with one scoring network for all heads.

    reduced_dim is P, the width of the first hidden layer too. Streaming is causal.
    """

    num_heads: int
    head_dim: int
    reduced_dim: int = 8
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = neural_attention

    def setup(self):
        N, H, P = self.num_heads, self.head_dim, self.reduced_dim
        if P < 2:
            raise ValueError(f"reduced_dim={P} must be at least 2")
        self.query = layers.HeadProjection(N, H, self.dtype)
        self.key = layers.HeadProjection(N, H, self.dtype)
        self.value = layers.HeadProjection(N, H, self.dtype)
        self.reduce_query = layers.Dense(P, dtype=self.dtype)
        self.reduce_key = layers.Dense(P, dtype=self.dtype)
        init, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros
        self.w1 = layers.Table((2 * P, P), init)
        self.b1 = layers.Table((P,), zeros)
        self.w2 = layers.Table((P, P // 2), init)
        self.b2 = layers.Table((P // 2,), zeros)
        self.w3 = layers.Table((P // 2,), nn.initializers.normal((P // 2) ** -0.5))
        self.attend = layers.Attend(self.fn)
        self.out = layers.OutputProjection(self.dtype)

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says what each token sees."""
        o = self.attend(*self._project(x), *self._network(), mask=mask)
        return self.out(o, x.shape[-1])

    def init_state(self, batch: int, length: int) -> decode.KVCache:
        """An empty cache for `length` tokens, with reduced keys."""
        sizes = self.num_heads, self.reduced_dim, self.head_dim
        return decode.KVCache.empty(batch, length, *sizes, self.dtype or jnp.float32)

    def extend(
        self, state: decode.KVCache, x: Float[Array, "B T D"]
    ) -> tuple[decode.KVCache, Float[Array, "B T D"]]:
        """The next T tokens, each of which sees those before it and itself."""
        q, k, v = self._project(x)
        cache = state.append(k, v)
        options = dict(mask=masks.Causal(), q_offset=state.length)
        o = self.attend(q, cache.k, cache.v, *self._network(), **options)
        return cache, self.out(o, x.shape[-1])

    def _project(self, x):
        return self.reduce_query(self.query(x)), self.reduce_key(self.key(x)), self.value(x)

    def _network(self):
        return self.w1(), self.b1(), self.w2(), self.b2(), self.w3()


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
    pair = dict(q=draw(0, 2, T, 4, 4), k=draw(1, 2, T, 4, 4), v=draw(2, 2, T, 4, 5))
    first = dict(w1=draw(3, 8, 6), b1=draw(4, 6))
    return pair | first | dict(w2=draw(5, 6, 3), b2=draw(6, 3), w3=draw(7, 3))


def _oracle(q, k, v, w1, b1, w2, b2, w3, *, mask=None):
    def score(q, k):
        hidden = jnp.maximum(jnp.concatenate([q, k]) @ w1 + b1, 0)
        return jnp.maximum(hidden @ w2 + b2, 0) @ w3

    def head(q, k, v, seen):
        x = jax.vmap(lambda q: jax.vmap(lambda k: score(q, k))(k))(q)
        return jax.nn.softmax(jnp.where(seen, x, -1e30)) @ v

    seen = masks.dense(mask, q.shape[1], k.shape[1])[0, 0]
    return jax.vmap(jax.vmap(head, (1, 1, 1, None), 1), (0, 0, 0, None))(q, k, v, seen)


SPEC = registry.Mechanism(
    fn=neural_attention,
    module=NeuralAttention,
    small=dict(num_heads=4, head_dim=8),
    papers=("neural-attention",),
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
            Claim.FORWARD_MODE,
            Claim.CONTEXT_PARALLEL,
        }
    ),
    context=("gather", "all_to_all"),
)
