r"""Dynamic mask attention: a key's own value says how much it matters, and the best few are kept.

Paper: Shi et al., "Trainable Dynamic Mask Sparse Attention", arXiv:2508.02124, section 3.

    d_s = a * softplus(v_s W)                  v_s of all key heads; one score for each key head
    o_t = sum_s softmax_s(q_t . k_s / sqrt(H) + d_s) v_s
                                               over the `window` keys of highest d_s among s <= t

The scores learn as a bias of the softmax; the choice has no gradient. A key that is dropped once is
never among the best again, so a state holds no more than `window` keys, and a chunk of C queries
needs only the best before it and its own: the cost is linear in T.

Shapes: B batch, T queries, S keys, N heads, K kv-heads, H head dim, V value dim, C queries of a
chunk, W = window keys kept, M = W + C.
Unlike the paper: a is 1 at first, where the authors' 0 makes all keys alike, so that W learns
nothing from the first step; of equal scores the later key is kept; queries and keys are not
normalised. In the authors' later code all queries share one choice over the whole sequence, which
lets the future decide what is kept; here each chooses among the keys up to its own, as in the
paper's causal form.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnjax.core import attention, layers, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops

_CHUNK = 64  # queries taken at a time


def dma(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    score: Float[Array, "B S K"],
    *,
    mask: masks.Mask | None = None,
    window: int = 1024,
) -> Float[Array, "B T N V"]:
    """o in v's dtype; always causal. The queries belong to the last T keys.

    Args:
      score: d, as `key_scores` gives it; -inf is a key that nobody sees.
      mask: honours Valid and Causal; NotImplementedError for others.
      window: W.

    Raises ValueError for a window below 1, and for more queries than keys.
    """
    T, S = q.shape[1], k.shape[1]
    if window < 1 or T > S:
        raise ValueError(f"{window=} must be at least 1, and {T=} at most {S=}")
    _, valid = masks.select(mask, masks.Causal, masks.Valid, by="dma")
    seen = functools.reduce(jnp.logical_and, (x.keys for x in valid), jnp.ones(k.shape[:2], bool))
    score = jnp.where(seen[..., None], score.astype(jnp.float32), -jnp.inf)
    C, W = min(T, _CHUNK), min(window, S)
    pad = lambda x, fill=0: jnp.pad(
        x, [(0, 0), (0, -T % C)] + [(0, 0)] * (x.ndim - 2), constant_values=fill
    )
    q, k, v, score = pad(q), pad(k), pad(v), pad(score, -jnp.inf)
    start = jnp.arange(S - T, S, C)
    attend = jax.checkpoint(functools.partial(_chunk, k, v, score, W))
    q = q.reshape(q.shape[0], -1, C, *q.shape[2:]).swapaxes(0, 1)
    o = jax.lax.map(lambda x: attend(*x), (q, start, _kept(score, W, start, C)))
    return o.swapaxes(0, 1).reshape(o.shape[1], -1, *o.shape[3:])[:, :T].astype(v.dtype)


class Kept(NamedTuple):
    """The best keys, in any order. Those of score -inf fill up."""

    score: Float[Array, "*B W K"]
    at: Int[Array, "*B W K"]


def _best(keys: Kept, W: int) -> Kept:
    """The W of highest score (axis -2) and, of equals, the latest."""
    order = jnp.lexsort((-keys.at, -keys.score), axis=-2)[..., :W, :]
    return Kept(*(jnp.take_along_axis(x, order, -2) for x in keys))


def _kept(score, W, start, C) -> Kept:
    """The best W keys before each chunk that begins at `start`."""
    score = jax.lax.stop_gradient(score)
    B, S, K = score.shape
    at = jnp.broadcast_to(jnp.arange(S)[None, :, None], score.shape)
    keys = Kept(score, at)
    none = Kept(jnp.full((B, W, K), -jnp.inf), jnp.zeros((B, W, K), at.dtype))
    join = lambda a, b: Kept(*(jnp.concatenate(x, 1) for x in zip(a, b, strict=True)))

    def step(kept, start):
        own = Kept(*(jax.lax.dynamic_slice_in_dim(x, start, C, 1) for x in keys))
        return _best(join(kept, own), W), kept

    past = S - C * len(start)
    return jax.lax.scan(step, _best(join(none, Kept(score[:, :past], at[:, :past])), W), start)[1]


def _chunk(k, v, score, W, q, start, kept: Kept):
    """Attention of queries q (B C N H) that begin at `start`, to the best before and their own."""
    (B, C, N, H), K = q.shape, k.shape[2]
    t = start + jnp.arange(C)
    own = jnp.broadcast_to(t[None, :, None], (B, C, K))
    place = lambda at: (jnp.arange(B)[:, None, None], at, jnp.arange(K)[None, None])
    rank = jax.lax.stop_gradient(score[place(own)])
    keys = Kept(*(jnp.concatenate(x, 1) for x in ((kept.score, rank), (kept.at, own))))
    rank, at = _best(keys, W + C)
    past = (at[:, None] <= t[None, :, None, None]) & (rank > -jnp.inf)[:, None]  # B C M K
    seen = past & (jnp.cumsum(past, 2) <= W)
    bias = jnp.where(rank > -jnp.inf, score[place(at)], 0.0)

    def head(q, k, v, seen, bias):
        options = dict(mask=masks.Dense(seen[:, None]), bias=bias[:, None, None])
        k, v = k[:, :, None], v[:, :, None]
        return ops.dot_product_attention(q, k, v, implementation="dense", **options)

    q, k, v = q.reshape(B, C, K, N // K, H), k[place(at)], v[place(at)].astype(jnp.float32)
    o = jax.vmap(head, (2, 2, 2, 3, 2), 2)(q, k, v, seen, bias)
    return o.reshape(B, C, N, -1)


def key_scores(
    v: Float[Array, "B S K V"], weight: Float[Array, "K V N"], a: Float[Array, "N"]
) -> Float[Array, "B S N"]:
    """d in float32, N being the key heads that are scored, by the values of all K."""
    x = jnp.einsum("BSKV,KVN->BSN", v.astype(jnp.float32), weight)
    return a[None, None] * jax.nn.softplus(x)


class KeptCache(NamedTuple):
    """The best keys so far, in the order of their positions; those of score -inf are empty."""

    k: Float[Array, "B W K H"]
    v: Float[Array, "B W K V"]
    score: Float[Array, "B W K"]
    length: Int[Array, ""]  # tokens seen so far

    def join(self, k, v, score) -> list[jax.Array]:
        """Keys, values and scores with T more tokens."""
        pairs = zip(self[:3], (k, v, score), strict=True)
        return [jnp.concatenate([old, new.astype(old.dtype)], 1) for old, new in pairs]

    def append(self, k, v, score) -> "KeptCache":
        """The cache after T more tokens."""
        T, (B, W, K) = k.shape[1], self.score.shape
        k, v, score = self.join(k, v, score)
        at = jnp.broadcast_to(jnp.arange(W + T)[None, :, None], score.shape)
        kept = jnp.sort(_best(Kept(score, at), W).at, 1)
        place = jnp.arange(B)[:, None, None], kept, jnp.arange(K)[None, None]
        return KeptCache(k[place], v[place], score[place], self.length + T)


class Dma(attention.KeyValueAttention):
    """Attention over (B T D) to the `window` best keys by their values. Always causal."""

    window: int = 1024
    fn: Callable[..., jax.Array] = dma

    def setup(self):
        super().setup()
        K = self.num_kv_heads or self.num_heads
        self.weight = layers.Table((K, self.head_dim, K), nn.initializers.lecun_normal((0, 1)))
        self.amount = layers.Table((K,), nn.initializers.ones)

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says which tokens are Valid."""
        q, k, v = self._project(x, jnp.arange(x.shape[1]))
        score = key_scores(v, self.weight(), self.amount())
        return self.out(self.attend(q, k, v, score, mask=mask, window=self.window), x.shape[-1])

    def init_state(self, batch: int, length: int) -> KeptCache:
        """An empty cache, of `window` tokens for any greater `length`."""
        K, H = self.num_kv_heads or self.num_heads, self.head_dim
        shape = batch, min(self.window, length), K
        zeros = jnp.zeros((*shape, H), self.dtype or jnp.float32)
        return KeptCache(zeros, zeros, jnp.full(shape, -jnp.inf), jnp.zeros((), jnp.int32))

    def extend(
        self, state: KeptCache, x: Float[Array, "B T D"]
    ) -> tuple[KeptCache, Float[Array, "B T D"]]:
        """The next T tokens, which see the best of the cache and of themselves."""
        q, k, v = self._project(x, state.length + jnp.arange(x.shape[1]))
        score = key_scores(v, self.weight(), self.amount())
        o = self.attend(q, *state.join(k, v, score), window=self.window)
        return state.append(k, v, score), self.out(o, x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k[:, :, :2], v=v[:, :, :2], score=jax.random.normal(key, (2, T, 2)))


def _oracle(q, k, v, score, *, window=1024, mask=None):
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    causal = masks.dense(masks.Causal(), T, T)
    k, v, score = (jnp.repeat(x, G, 2) for x in (k, v, score))
    score = score.swapaxes(1, 2)
    better = (score[:, :, None] > score[..., None])[:, :, None] & causal[:, :, :, None]
    seen = causal & (better.sum(-1) < window)
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1]) + score[:, :, None]
    return jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(jnp.where(seen, x, -1e30)), v)


SPEC = registry.Mechanism(
    fn=dma,
    module=Dma,
    small=dict(num_heads=4, head_dim=8, num_kv_heads=2, window=3),
    papers=("dma",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(window=5, mask=masks.Causal())),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.STREAMABLE,
            Claim.DENSE_TWIN,
            Claim.LINEAR_MEMORY,
            Claim.LINEAR_COMPUTE,
            Claim.FORWARD_MODE,
            Claim.CONTEXT_PARALLEL,
        }
    ),
    context=("all_to_all",),
)
