r"""Routing attention: tokens attend within clusters that an online k-means finds.

Paper: Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers",
arXiv:2003.05997, section 4.1 and algorithm 1.

    Q, K    = q, k with mean 0 and variance 1                          so all of length sqrt(H)
    cluster = the `window` tokens of highest mu_c . Q_t (and likewise K_s), for each centroid mu_c
    o_ct    = attention of Q_t to the K_s of cluster c, for the queries t of cluster c
    o_t     = mean of the o_ct over the clusters that t is in, 0 where it is in none
    mu_c   <- decay mu_c + (1 - decay) (mean of Q_t + mean of K_s) / 2

over the t and s that have mu_c as the nearest centroid. Clusters are of one size whatever the
tokens are, so attention is a dense product in each. With about sqrt(T) clusters of sqrt(T) tokens
the cost is O(T^1.5). Centroids learn from `clustering_loss` alone: a step of plain gradient descent
with rate 1 - decay is the last equation, and any other optimiser does, too.

Shapes: B batch, T tokens, N heads, H head dim, V value dim, C clusters, W = window tokens of each.
Unlike the paper: in the module, queries are the keys of their tokens, masked or not (the paper has
it so where masked); centroids are scaled to length sqrt(H) where they choose, not where they are
stored; heads with a sliding window, half of the paper's, are a model's choice.

With a causal mask no query sees a later key. But which tokens form a cluster depends on all of
them, so this is not strictly causal, and can't be computed token by token.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnjax.core import layers, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import auxiliary_loss
from attnjax.ops import dot_product_attention as ops

_KINDS = masks.Causal, masks.Window, masks.Prefix, masks.Segments, masks.Valid


def routing_transformer(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    centroids: Float[Array, "N C H"],
    *,
    mask: masks.Mask | None = None,
    window: int | None = None,
    clustering: float = 0.0,
) -> Float[Array, "B T N V"]:
    """o in v's dtype.

    Args:
      mask: what a query sees of its clusters; honours Causal, Window, Prefix, Segments and Valid,
        NotImplementedError for others. Tokens that Valid hides are chosen last.
      window: W, at most T; T / C rounded up where None.
      clustering: weight of `clustering_loss`, which is added to any gradient; 0 is none.

    Raises ValueError for a window below 1.
    """
    if window is not None and window < 1:
        raise ValueError(f"{window=} must be at least 1, or None")
    valid = _valid(mask, k)
    T, C = k.shape[1], centroids.shape[1]
    choose = functools.partial(_choose, centroids, valid, min(T, window or -(-T // C)))
    Q, K = _normalise(q), _normalise(k)
    t, s = choose(Q), choose(K)
    o = _scatter(_attend(_take(Q, t), _take(K, s), _take(v, s), t, s, mask), t, T)
    if clustering:
        loss = clustering_loss(q, k, centroids, mask=mask)
        o = auxiliary_loss.attach(o, clustering * loss)
    return o.astype(v.dtype)


def clustering_loss(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    centroids: Float[Array, "N C H"],
    *,
    mask: masks.Mask | None = None,
) -> Float[Array, ""]:
    """Half the squared distance of centroids to their tokens' means, summed; q, k are constants.

    Half of it counts for queries and half for keys. A centroid that is nearest to none is left out.
    """
    valid = _valid(mask, k)

    def of(x):
        x = jax.lax.stop_gradient(_normalise(x))
        nearest = jnp.argmax(_similarity(x, centroids), 2)
        own = jax.nn.one_hot(nearest, centroids.shape[1], axis=2) * valid[:, None, None]
        count = own.sum((0, 3))
        mean = jnp.einsum("BNCT,BTNH->NCH", own, x) / jnp.maximum(count, 1)[..., None]
        distance = ((centroids.astype(jnp.float32) - mean) ** 2).sum(-1)
        return jnp.where(count > 0, distance, 0).sum() / 4

    return of(q) + of(k)


def _valid(mask, k):
    """Tokens (B T) that Valid leaves."""
    *_, valid = masks.select(mask, *_KINDS, by="routing_transformer")
    return functools.reduce(jnp.logical_and, (x.keys for x in valid), jnp.ones(k.shape[:2], bool))


def _normalise(x):
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def _similarity(x, centroids):
    return jnp.einsum("NCH,BTNH->BNCT", _normalise(centroids), x)


def _choose(centroids, valid, window, x: Float[Array, "B T N H"]) -> Int[Array, "B N C W"]:
    """Positions of the tokens of each cluster."""
    score = jnp.where(valid[:, None, None], _similarity(x, centroids), -jnp.inf)
    return jax.lax.top_k(score, window)[1]


def _take(x, at):
    """(B T N H) at (B N C W) -> (B N C W H)."""
    B, _, N, _ = x.shape
    return x[jnp.arange(B)[:, None, None, None], at, jnp.arange(N)[None, :, None, None]]


def _scatter(o, at, T):
    """(B N C W V) -> (B T N V): the mean of what a token gets."""
    B, N, *_, V = o.shape
    place = jnp.arange(B)[:, None, None, None], at, jnp.arange(N)[None, :, None, None]
    total = jnp.zeros((B, T, N, V), jnp.float32).at[place].add(o)
    count = jnp.zeros((B, T, N), jnp.float32).at[place].add(1.0)
    return total / jnp.maximum(count, 1)[..., None]


def _attend(q, k, v, t, s, mask):
    """Attention within each cluster, whose tokens are at positions t and s."""
    leaves, tree = jax.tree.flatten(mask)  # each (B or 1, length)
    leaves = [jnp.broadcast_to(x, (len(q), *x.shape[1:])) for x in leaves]

    def cluster(q, k, v, t, s, leaves):
        seen = tree.unflatten([x[None] for x in leaves])
        q, k, v = (x[None, :, None] for x in (q, k, v.astype(jnp.float32)))
        return ops.dot_product_attention(q, k, v, mask=seen, positions=(t, s))[0, :, 0]

    clusters = jax.vmap(cluster, (0, 0, 0, 0, 0, None))
    return jax.vmap(jax.vmap(clusters, (0, 0, 0, 0, 0, None)))(q, k, v, t, s, leaves)


class RoutingTransformer(nn.Module):
    """Routing attention over (B T D), in which the keys are the queries.

    The centroids learn along with whatever is trained, by `clustering` times their own loss.
    """

    num_heads: int
    head_dim: int
    num_clusters: int = 16
    window: int | None = None
    clustering: float = 1.0
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = routing_transformer

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says what each token sees of its clusters."""
        N, H = self.num_heads, self.head_dim
        q, v = (
            layers.HeadProjection(N, H, self.dtype, name=name)(x) for name in ("query", "value")
        )
        shape = N, self.num_clusters, H
        centroids = layers.Table(shape, nn.initializers.normal(1.0), name="centroids")()
        attend = layers.Attend(self.fn, name="attend")
        options = dict(window=self.window, clustering=self.clustering)
        o = attend(q, q, v, centroids, mask=mask, **options)
        return layers.OutputProjection(self.dtype, name="out")(o, x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 3, 8))
    return dict(q=q, k=k, v=v, centroids=jax.random.normal(jax.random.fold_in(key, 1), (3, 4, 8)))


def _oracle(q, k, v, centroids, *, mask=None, window=None):
    T, C = q.shape[1], centroids.shape[1]
    norm = lambda x: (x - x.mean(-1, keepdims=True)) / jnp.std(x, -1, keepdims=True)
    q, k, centroids = (norm(x.astype(jnp.float32)) for x in (q, k, centroids))
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    total, count = 0.0, 0.0
    for c in range(C):

        def members(x, c=c):
            a = jnp.einsum("NH,BTNH->BNT", centroids[:, c], x)
            return (a[..., None, :] > a[..., :, None]).sum(-1) < (window or -(-T // C))

        seen = members(k)[:, :, None] & masks.dense(mask, T, T)
        w = jnp.where(seen, jax.nn.softmax(jnp.where(seen, x, -1e30)), 0)
        total += jnp.einsum("BNTS,BSNV->BTNV", w * members(q)[..., None], v)
        count += members(q).swapaxes(1, 2)[..., None]
    return total / jnp.maximum(count, 1)


SPEC = registry.Mechanism(
    fn=routing_transformer,
    module=RoutingTransformer,
    small=dict(num_heads=4, head_dim=8, num_clusters=2, window=5),
    papers=("routing-transformer",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(window=30, mask=masks.Causal())),
    claims=frozenset(
        {Claim.MASKABLE, Claim.PERMUTATION_EQUIVARIANT, Claim.DENSE_TWIN, Claim.FORWARD_MODE}
    ),
)
