r"""MoA: a token chooses a few attention heads of many, by a router; all look at the same keys.

Paper: Zhang et al., "Mixture of Attention Heads: Selecting Attention Heads Per Token",
arXiv:2210.05144, section 3.

    p    = softmax(x W_g)
    w_a  = p_a / constant(sum_a' p_a')                of the A heads with the highest p
    y_t  = sum_a w_a softmax(x_t W_q,a K^T / sqrt(H)) V W_o,a,       K = x W_k,  V = x W_v

W_q and W_o belong to a head, W_k and W_v to all, so that more heads cost more parameters and no
more arithmetic or cache: a token's queries and outputs are computed in its own A heads.

losses: `ops.routing.load_balance_loss` and `ops.routing.router_z_loss` of x W_g.

Shapes: B batch, T queries, S keys, E heads to choose from, A = topk, H head dim, D model dim.
Unlike the paper: positions are left to the model. The authors' code can add noise to x W_g and a
loss for the variation of the load, which are not here, and doesn't divide by the sum.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnjax.core import decode, layers, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import routing


def moa_attention_heads(
    x: Float[Array, "B T D"],
    k: Float[Array, "B S 1 H"],
    v: Float[Array, "B S 1 H"],
    query: Float[Array, "E D H"],
    out: Float[Array, "E H D"],
    logits: Float[Array, "B T E"],
    *,
    topk: int = 2,
    mask: masks.Mask | None = None,
    q_offset: int | Int[Array, ""] = 0,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T D"]:
    """y, in x's dtype.

    Args:
      query, out: W_q and W_o of all heads.
      logits: x W_g.
      topk: heads of a token; other options: `ops.dot_product_attention`.

    Raises ValueError for a topk that is not 1 to E.
    """
    gates, chosen = routing.choose(logits, topk=topk, total="constant")
    q = routing.expert_dense(x, query, chosen)
    options = dict(mask=mask, q_offset=q_offset, implementation=implementation)
    o = ops.dot_product_attention(q, k, v, **options)
    return routing.combine(o, out, gates, chosen)


class MoaAttentionHeads(nn.Module):
    """A mixture over (B T D) of `num_heads` heads a token, of num_experts (None: twice as many)."""

    num_heads: int
    head_dim: int
    num_experts: int | None = None
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = moa_attention_heads

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says what each token sees."""
        return self._attend(x, None, mask)[1]

    def init_state(self, batch: int, length: int) -> decode.KVCache:
        """An empty cache for `length` tokens."""
        H = self.head_dim
        return decode.KVCache.empty(batch, length, 1, H, H, self.dtype or jnp.float32)

    def extend(
        self, state: decode.KVCache, x: Float[Array, "B T D"]
    ) -> tuple[decode.KVCache, Float[Array, "B T D"]]:
        """The next T tokens, each of which sees those before it and itself."""
        return self._attend(x, state, masks.Causal())

    @nn.compact
    def _attend(self, x, state, mask):
        E, D, H = self.num_experts or 2 * self.num_heads, x.shape[-1], self.head_dim
        init = nn.initializers.lecun_normal(batch_axis=0)
        query = layers.Table((E, D, H), init, name="query")()
        out = layers.Table((E, H, D), init, name="out")()
        logits = layers.Dense(E, use_bias=False, dtype=self.dtype, name="router")(x)
        x = x.astype(self.dtype or x.dtype)
        k, v = (layers.HeadProjection(1, H, self.dtype, name=name)(x) for name in ("key", "value"))
        at = dict(mask=mask, topk=self.num_heads)
        if state is not None:
            at["q_offset"], state = state.length, state.append(k, v)
            k, v = state.k, state.v
        return state, layers.Attend(self.fn, name="attend")(x, k, v, query, out, logits, **at)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
    k, v = draw(0, 2, 2, T, 1, 8)
    heads = dict(query=draw(1, 4, 12, 8) / 3, out=draw(2, 4, 8, 12) / 3)
    return dict(x=draw(3, 2, T, 12), k=k, v=v, logits=draw(4, 2, T, 4)) | heads


def _oracle(x, k, v, query, out, logits, *, topk=2, mask=None):
    rank = jnp.argsort(jnp.argsort(-logits))
    p = jnp.where(rank < topk, jax.nn.softmax(logits), 0)
    w, y = p / jax.lax.stop_gradient(p.sum(-1, keepdims=True)), 0
    for e in range(len(query)):
        z = (x @ query[e]) @ k[:, :, 0].mT / jnp.sqrt(k.shape[-1])
        z = jnp.where(masks.dense(mask, *z.shape[1:])[:, 0], z, -1e30)
        y += w[..., e, None] * (jax.nn.softmax(z) @ v[:, :, 0] @ out[e])
    return y


SPEC = registry.Mechanism(
    fn=moa_attention_heads,
    module=MoaAttentionHeads,
    small=dict(num_heads=2, head_dim=8, num_experts=4),
    papers=("moa-attention-heads",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(topk=3, mask=masks.Causal())),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.PERMUTATION_EQUIVARIANT,
            Claim.STREAMABLE,
            Claim.LINEAR_MEMORY,
            Claim.FORWARD_MODE,
            Claim.CONTEXT_PARALLEL,
        }
    ),
    context=("gather",),
)
