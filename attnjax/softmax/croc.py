r"""Croc: tokens of an image see each other, and a learned pool stands in for some of them.

Paper: Xie et al., "Croc: Pretraining Large Multimodal Models with Cross-Modal Comprehension",
arXiv:2410.14332; the share that is replaced and the loss are those of the authors' code.

    o_t  = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s       over s <= t, and, where t is of an image,
                                                          over every s of an image
    x'_r = pool_pi(r) for the replaced tokens r           pi: of all that give no token of the pool
                                                          twice, that with the least sum of
                                                          ||x_r - pool_pi(r)||
    loss = 10 mean(huber(y - x)),      huber(e) = e^2 / (2 beta) for |e| < beta, else |e| - beta / 2

In a stage of the pretraining three quarters of an image's tokens are replaced, by tokens of a
learned pool (`replace_tokens`), and the model has to give back all of them as they were
(`reconstruction_loss`), with sight of the whole image. Text sees an image if it comes after it.

Shapes: B batch, T queries, S keys, N heads, K kv-heads, H head dim, V value dim, D model dim,
R replaced tokens, M tokens of the pool.
Unlike the paper: attention, replacement and loss, without the layer that predicts tokens, caption
data and stages. The authors' code takes the nearest token of the pool, though two may get the same,
and in place of images opens all that is before the answer. How well such models answer the paper
shows by training, and nothing here does.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnjax.core import attention, decode, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops


def croc(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    visual: Bool[Array, "B S"],
    *,
    mask: masks.Mask | None = None,
    score_mod: Callable[..., jax.Array] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """Attention under `mixed(visual)`, in v's dtype. Options: `ops.dot_product_attention`.

    Args:
      visual: which tokens are of an image, by position, queries too.
      mask: what else limits what a token sees; `masks.Causal()` leaves plain causal attention.
    """
    seen = mixed(visual) if mask is None else mixed(visual) & mask
    options = dict(score_mod=score_mod, q_offset=q_offset, implementation=implementation)
    return ops.dot_product_attention(q, k, v, mask=seen, **options)


def mixed(visual: Bool[Array, "B S"]) -> masks.Mask:
    """Causal, and from images to images."""
    image = lambda other: jnp.where(visual, 1, other)
    return masks.Causal() | masks.Segments(image(0), image(-1))


def replace_tokens(
    x: Float[Array, "B S D"], pool: Float[Array, "M D"], replaced: Int[Array, "B R"]
) -> Float[Array, "B S D"]:
    """x', in x's dtype, for tokens `replaced` of each image; the pool gets the gradient of x'_r.

    The authors scale tokens to length 1 before. Raises ValueError for M < R.
    """
    old = jnp.take_along_axis(x, replaced[..., None], 1)
    chosen = jax.vmap(assign)(jax.lax.stop_gradient(_distances(old, pool)))
    return x.at[jnp.arange(len(x))[:, None], replaced].set(pool[chosen].astype(x.dtype))


def _distances(x, pool):
    """Of tokens (B R D) to those of the pool: (B R M), without an array (B R M D)."""
    x, pool = x.astype(jnp.float32), pool.astype(jnp.float32)
    squares = (x**2).sum(-1, keepdims=True) + (pool**2).sum(-1)[None, None]
    return jnp.sqrt(jnp.maximum(squares - 2 * x @ pool.T, 0.0))


def assign(cost: Float[Array, "R M"]) -> Int[Array, "R"]:
    """A column for each row, none twice, with the least sum of costs (the Hungarian algorithm).

    Rows come in one by one. Each is the start of a shortest path, over columns that are taken, to
    one that is free; costs minus the prices of rows and columns are lengths, and never negative.
    O(R^2 M) time. Raises ValueError for M < R.
    """
    R, M = cost.shape
    if M < R:
        raise ValueError(f"{M} columns must be at least the {R} rows")

    def enter(i, state):
        owner, *prices = state
        owner, came_from, column, prices = _shortest_path(cost, i, owner, *prices)

        def hand_on(at):  # a column, to the owner of the one before it
            owner, j = at
            return owner.at[j].set(owner[came_from[j]]), came_from[j]

        owner, _ = jax.lax.while_loop(lambda at: at[1] < M, hand_on, (owner, column))
        return owner, *prices

    start = jnp.full(M + 1, R), jnp.zeros(R), jnp.zeros(M + 1)
    owner, *_ = jax.lax.fori_loop(0, R, enter, start)
    return jnp.zeros(R + 1, jnp.int32).at[owner[:M]].set(jnp.arange(M, dtype=jnp.int32))[:R]


def _shortest_path(cost, row, owner, row_price, price):
    """To a free column: (owner, the column before each on its path, that column, new prices).

    Column M is no column: its owner is the row that enters. Owner R is no owner: a free column.
    """
    R, M = cost.shape

    def step(at):
        j, done, least, came_from, row_price, price = at
        done = done.at[j].set(True)
        length = cost[owner[j]] - row_price[owner[j]] - price[:M]
        nearer = ~done[:M] & (length < least)
        least, came_from = jnp.where(nearer, length, least), jnp.where(nearer, j, came_from)
        next_ = jnp.argmin(jnp.where(done[:M], jnp.inf, least))
        delta = least[next_]
        row_price = row_price.at[jnp.where(done, owner, R)].add(delta, mode="drop")
        least, price = least - jnp.where(done[:M], 0, delta), price - jnp.where(done, delta, 0)
        return next_, done, least, came_from, row_price, price

    owner = owner.at[M].set(row)
    start = jnp.full(M, jnp.inf), jnp.full(M, M), row_price, price
    at = jax.lax.while_loop(lambda at: owner[at[0]] < R, step, (M, jnp.zeros(M + 1, bool), *start))
    column, _, _, came_from, *prices = at
    return owner, came_from, column, prices


def reconstruction_loss(
    y: Float[Array, "B S D"], x: Float[Array, "B S D"], *, beta: float = 0.01
) -> Float[Array, ""]:
    """The loss of predictions y for an image's tokens x, which get no gradient."""
    error = jnp.abs(y.astype(jnp.float32) - jax.lax.stop_gradient(x).astype(jnp.float32))
    return 10 * jnp.where(error < beta, error**2 / (2 * beta), error - beta / 2).mean()


class Croc(attention.KeyValueAttention):
    """Mixed attention over (B T D). Without `visual` all is text, seen causally."""

    fn: Callable[..., jax.Array] = croc

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: masks.Mask | None = None,
        visual: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `visual` says which tokens are of an image."""
        visual = jnp.zeros(x.shape[:2], bool) if visual is None else visual
        q, k, v = self._project(x, jnp.arange(x.shape[1]))
        return self.out(self.attend(q, k, v, visual, mask=mask), x.shape[-1])

    def extend(
        self,
        state: decode.KVCache,
        x: Float[Array, "B T D"],
        *,
        visual: Bool[Array, "B T"] | None = None,
    ) -> tuple[decode.KVCache, Float[Array, "B T D"]]:
        """The next T tokens. An image sees what of it comes after only where both are in x."""
        visual = jnp.zeros(x.shape[:2], bool) if visual is None else visual
        q, k, v = self._project(x, state.length + jnp.arange(x.shape[1]))
        cache = state.append(k, v)
        before = jnp.zeros(cache.k.shape[:2], bool)  # is seen causally, of an image or not
        visual = jax.lax.dynamic_update_slice_in_dim(before, visual, state.length, 1)
        o = self.attend(q, cache.k, cache.v, visual, q_offset=state.length)
        return cache, self.out(o, x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k, v=v, visual=jax.random.bernoulli(key, 0.5, (2, T)))


def _oracle(q, k, v, visual, *, mask=None):
    T, S = q.shape[1], k.shape[1]
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    seen = jnp.tril(jnp.ones((T, S), bool))[None] | (visual[:, :T, None] & visual[:, None, :])
    seen = seen[:, None] & masks.dense(mask, T, S)
    return jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(jnp.where(seen, x, -1e30)), v)


SPEC = registry.Mechanism(
    fn=croc,
    module=Croc,
    small=dict(num_heads=4, head_dim=8),
    papers=("croc",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(implementation="blocked"), dict(mask=masks.Causal())),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.CROSS,
            Claim.STREAMABLE,
            Claim.DENSE_TWIN,
            Claim.LINEAR_MEMORY,
            Claim.CONTEXT_PARALLEL,
            Claim.FORWARD_MODE,
        }
    ),
    context=("gather",),
)
