r"""MoH: each token takes part in a few heads that it chooses, and in some that all share.

Paper: Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv:2410.11842,
section 3.2, and section 4 for the continue-tuning of a trained model.

    y     = sum_n g_n head_n P_o,n               a sum where multi-head attention has g_n = 1
    g_n   = a_1 M softmax(W_s x)_n               of the M shared heads
    g_n   = a_2 A r_n / sum_chosen r             of the A routed heads with the highest r,
    r     = softmax(W_r x)                       0 of the other routed heads
    a     = 2 softmax(W_h x)

loss: A times `ops.routing.load_balance_loss` of the routed heads. A head that a token doesn't
choose is not computed for it; keys and values are, as other tokens may look for them there.

In continue-tuning the routers are no parameters: W_r x is the norm of each routed head's query,
divided by the deviation among them (`query_norms`), and the weights are rounded to 1 or 0, with the
gradient of what was rounded (`weights="rounded"`). Then attention with all heads is as it was.

Shapes: B batch, T queries, S keys, N = M + E heads, M shared, E routed, A = topk of them chosen,
kv heads of keys, H head dim, V value dim, D model dim.
Unlike the paper: the factors M, A and 2, which make uniform weights 1, and the division by the
sum stand in the authors' code alone; as there, topk=1 leaves W_r to the loss to learn. That it
does better than attention in all heads the paper shows by training at scale; nothing here does.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnjax.core import attention, decode, layers, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import routing

Logits = Literal["learned", "query_norm"]
Weights = Literal["soft", "rounded"]


def moh(
    q: Float[Array, "B T heads H"],  # not N: a choice is among all, so no device can have a part
    k: Float[Array, "B S kv H"],
    v: Float[Array, "B S kv V"],
    routed: Float[Array, "B T E"],
    shared: Float[Array, "B T M"],
    balance: Float[Array, "B T 2"],
    *,
    topk: int = 2,
    weights: Weights = "soft",
    mask: masks.Mask | None = None,
    q_offset: int | Int[Array, ""] = 0,
) -> Float[Array, "B T heads V"]:
    """g_n head_n, zero for heads that are not chosen, in v's dtype.

    Args:
      routed, shared, balance: W_r x, W_s x and W_h x. The first M heads are the shared ones.
      mask, q_offset: `ops.routing.routed_attention`.

    Raises ValueError for a topk that is not 1 to E, other weights, and N that is not M + E.
    """
    N = q.shape[2]
    if shared.shape[-1] + routed.shape[-1] != N:
        raise ValueError(f"{N} heads must be as many as {shared.shape=} and {routed.shape=} say")
    gates, heads = choose_heads(routed, shared, balance, topk=topk, weights=weights)
    picked = jnp.take_along_axis(q, heads[..., None], 2)
    options = dict(num_heads=N, mask=mask, q_offset=q_offset, by="moh")
    o = gates[..., None] * routing.routed_attention(picked, k, v, heads, **options)
    b, t, _ = jnp.ix_(*(jnp.arange(n) for n in heads.shape))
    return jnp.zeros((*q.shape[:3], v.shape[-1]), v.dtype).at[b, t, heads].set(o.astype(v.dtype))


def choose_heads(
    routed: Float[Array, "B T E"],
    shared: Float[Array, "B T M"],
    balance: Float[Array, "B T 2"],
    *,
    topk: int,
    weights: Weights = "soft",
) -> tuple[Float[Array, "B T heads"], Int[Array, "B T heads"]]:
    """(g in float32, heads) of the shared heads and of those that each token chose."""
    if weights not in get_args(Weights):
        raise ValueError(f"{weights=} must be one of {get_args(Weights)}")
    M = shared.shape[-1]
    gates, chosen = routing.choose(routed, topk=topk)
    always = jnp.broadcast_to(jnp.arange(M), shared.shape)
    softmax = lambda x: jax.nn.softmax(x.astype(jnp.float32))
    of_shared, of_routed = jnp.split(2 * softmax(balance), 2, -1)
    gates = [of_shared * M * softmax(shared), of_routed * topk * gates]
    gates, heads = jnp.concatenate(gates, -1), jnp.concatenate([always, M + chosen], -1)
    return (gates if weights == "soft" else 1 + gates - jax.lax.stop_gradient(gates)), heads


def query_norms(q: Float[Array, "B T E H"]) -> Float[Array, "B T E"]:
    """The logits of E routed heads by their queries, with deviation 1, in float32.

    Raises ValueError for a single head, which has no deviation.
    """
    if (E := q.shape[2]) < 2:
        raise ValueError(f"{E} routed heads must be at least 2 to choose by their queries")
    norm = jnp.sqrt((q.astype(jnp.float32) ** 2).sum(-1) + 1e-12)  # a finite gradient at 0
    return norm / jnp.sqrt(norm.var(-1, ddof=1, keepdims=True) + 1e-12)


class MoH(attention.KeyValueAttention):
    """Attention over (B T D) in `num_shared` heads for all and `topk` of the others."""

    num_shared: int = 1
    topk: int = 2
    logits: Logits = "learned"
    weights: Weights = "soft"
    fn: Callable[..., jax.Array] = moh

    def setup(self):
        super().setup()
        M = self.num_shared
        if not 1 <= M < self.num_heads:
            raise ValueError(f"num_shared={M} must be 1 to num_heads - 1 = {self.num_heads - 1}")
        if self.logits not in get_args(Logits):
            raise ValueError(f"logits={self.logits!r} must be one of {get_args(Logits)}")
        if self.logits == "learned":
            dense = lambda features: layers.Dense(features, use_bias=False, dtype=self.dtype)
            self.router, self.balance = dense(self.num_heads - M), dense(2)
            self.share = dense(M) if M > 1 else None  # one head's share is all

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says what each token sees."""
        q, k, v = self._project(x, jnp.arange(x.shape[1]))
        return self._attend(x, q, k, v, mask=mask)

    def extend(
        self, state: decode.KVCache, x: Float[Array, "B T D"]
    ) -> tuple[decode.KVCache, Float[Array, "B T D"]]:
        """The next T tokens, each of which sees those before it and itself."""
        q, k, v = self._project(x, state.length + jnp.arange(x.shape[1]))
        cache, at = state.append(k, v), dict(mask=masks.Causal(), q_offset=state.length)
        return cache, self._attend(x, q, cache.k, cache.v, **at)

    def _attend(self, x, q, k, v, **options):
        learned = self.logits == "learned"
        equal = lambda count: jnp.zeros((*x.shape[:2], count), x.dtype)
        routed = self.router(x) if learned else query_norms(q[:, :, self.num_shared :])
        shared = self.share(x) if learned and self.share else equal(self.num_shared)
        balance = self.balance(x) if learned else equal(2)
        options |= dict(topk=self.topk, weights=self.weights)
        return self.out(self.attend(q, k, v, routed, shared, balance, **options), x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), (2, T, *shape))
    qkv = dict(q=draw(0, 6, 8), k=draw(1, 3, 8), v=draw(2, 3, 6))
    return qkv | dict(routed=draw(3, 4), shared=draw(4, 2), balance=draw(5, 2))


def _oracle(q, k, v, routed, shared, balance, *, topk=2, weights="soft", mask=None):
    rank = jnp.argsort(jnp.argsort(-routed))
    r = jnp.where(rank < topk, jax.nn.softmax(routed), 0)
    r = topk * r / r.sum(-1, keepdims=True)
    s = shared.shape[-1] * jax.nn.softmax(shared)
    a = 2 * jax.nn.softmax(balance)
    g = jnp.concatenate([a[..., :1] * s, a[..., 1:] * r], -1)
    if weights == "rounded":
        g = jnp.where(g > 0, 1, 0) + g - jax.lax.stop_gradient(g)
    heads = []
    for n in range(q.shape[2]):
        group = n * k.shape[2] // q.shape[2]
        x = q[:, :, n] @ k[:, :, group].mT / jnp.sqrt(q.shape[-1])
        x = jnp.where(masks.dense(mask, *x.shape[1:])[:, 0], x, -1e30)
        heads.append(g[:, :, n, None] * (jax.nn.softmax(x) @ v[:, :, group]))
    return jnp.stack(heads, 2)


SPEC = registry.Mechanism(
    fn=moh,
    module=MoH,
    small=dict(num_heads=6, head_dim=8, num_shared=2, topk=2),
    papers=("moh",),
    example=_example,
    oracle=_oracle,
    variants=(dict(topk=3), dict(mask=masks.Causal(), weights="rounded")),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.PERMUTATION_EQUIVARIANT,
            Claim.STREAMABLE,
            Claim.DENSE_TWIN,
            Claim.LINEAR_MEMORY,
            Claim.CONTEXT_PARALLEL,
        }
    ),
    context=("gather",),
)
