r"""S2-Attention: heads share out the past, each reads its near blocks and every so manieth far one.

Paper: Lin et al., "Efficient LLM Training and Serving with Heterogeneous Context Sharding among
Attention Heads", arXiv:2407.17678, section 3.

    head n sees block j of keys from block i >= j of queries where
        i - j < local   or   (j + n step + 1) mod stride = 0,      step = max(1, floor(stride / K))
    o_t = attention of q_t to the keys up to t in these blocks

A head's far blocks are a shard of the context; with as many heads as `stride` the shards together
are all of it. What is no shard of a head is never read again once it isn't near, so a cache keeps
local + L / stride of L blocks. Attention costs as many, without the others being computed.

Shapes: B batch, T queries, S keys, N heads, K kv-heads, H head dim, V value dim, C = block
tokens of a block, L blocks, M slots of the cache.
Unlike the paper: the query heads of a key head share its shard, so that it alone decides what is
kept; heads and layers that read everything are left to the model.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnjax.core import attention, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops


def s2_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: masks.Mask | None = None,
    block: int = 64,
    local: int = 16,
    stride: int = 8,
    positions: tuple[Int[Array, "T"], Int[Array, "S K"]] | None = None,
) -> Float[Array, "B T N V"]:
    """o in v's dtype; always causal.

    Args:
      mask: honours Valid and Causal; NotImplementedError for others.
      block: C.
      local: near blocks, with the query's own.
      stride: of the far blocks of a head.
      positions: those of queries and keys, by key head; a key at -1 is none. Without them, both
        begin at 0. With them there must be no mask but Causal.

    Raises ValueError for a block, local or stride below 1, and for lengths that differ without
    positions.
    """
    if block < 1 or local < 1 or stride < 1:
        raise ValueError(f"{block=}, {local=} and {stride=} must be at least 1")
    sizes = dict(block=block, local=local, stride=stride)
    if positions is not None:
        masks.select(mask, masks.Causal, by="s2_attention with positions")
        return _by_head(q, k, v, *positions, **sizes)
    masks.select(mask, masks.Causal, masks.Valid, by="s2_attention")
    T, S, K = q.shape[1], *k.shape[1:3]
    if T != S:
        raise ValueError(f"{T=} queries must be as many as {S=} keys without positions")
    i = np.arange(-(-T // block))
    seen = _sees(i[:, None], i[None], np.arange(K)[:, None, None], K, local, stride)
    seen = jnp.asarray(np.repeat(seen, q.shape[2] // K, 0))[None]
    seen = masks.Blocks(seen, block, block) & masks.Causal()
    return ops.dot_product_attention(q, k, v, mask=seen if mask is None else seen & mask)


def _sees(i, j, head, K, local, stride):
    """Whether block i of queries sees block j of keys in a key head; all are arrays."""
    return (j <= i) & ((i - j < local) | _in_shard(j, head, K, stride))


def _in_shard(j, head, K, stride):
    return (j + head * max(1, stride // K) + 1) % stride == 0


def _by_head(q, k, v, t, s, *, block, local, stride):
    """Attention to keys that lie at positions s (S K), each key head's own."""
    B, T, N, H = q.shape
    K = k.shape[2]

    def one(q, k, v, s, head):
        at = (t // block)[:, None], (s // block)[None]
        seen = _sees(*at, head, K, local, stride) & (s[None] <= t[:, None]) & (s >= 0)[None]
        k, v = k[:, :, None], v[:, :, None]
        return ops.dot_product_attention(q, k, v, mask=masks.Dense(seen[None, None]))

    q = q.reshape(B, T, K, N // K, H)
    o = jax.vmap(one, (2, 2, 2, 1, 0), 2)(q, k, v, s, jnp.arange(K))
    return o.reshape(B, T, N, -1)


class ShardedCache(NamedTuple):
    """What any later query may read: the near tokens in a ring, those of the shards by themselves.

    A token of a head's shard is kept there and not in the ring.
    """

    k: Float[Array, "B M K H"]
    v: Float[Array, "B M K V"]
    at: Int[Array, "M K"]  # positions, -1 where a slot is empty
    length: Int[Array, ""]

    def append(self, k, v, *, block, local, stride) -> "ShardedCache":
        """The cache with T more tokens, and without those that are needed no more."""
        (M, K), T, ring = self.at.shape, k.shape[1], block * local
        new = self.length + jnp.arange(T)[:, None]
        head, j = jnp.arange(K)[None], new // block
        kept = ring + j // stride * block + new % block
        last = new >= self.length + T - ring  # of those that meet in a slot, the last stays
        near = jnp.where(last, new % ring, M)
        slot = jnp.where(_in_shard(j, head, K, stride), kept, near)
        write = lambda old, x: old.at[:, slot, head].set(x.astype(old.dtype), mode="drop")
        at = self.at.at[slot, head].set(new, mode="drop")
        return ShardedCache(write(self.k, k), write(self.v, v), at, self.length + T)


class S2Attention(attention.KeyValueAttention):
    """Attention over (B T D) to near blocks and, by head, a shard of the others. Always causal."""

    block: int = 64
    local: int = 16
    stride: int = 8
    fn: Callable[..., jax.Array] = s2_attention

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says which tokens are Valid."""
        q, k, v = self._project(x, jnp.arange(x.shape[1]))
        return self.out(self.attend(q, k, v, mask=mask, **self._sizes), x.shape[-1])

    def init_state(self, batch: int, length: int) -> ShardedCache:
        """An empty cache for `length` tokens: of them, local and 1 / stride of the blocks."""
        K, H = self.num_kv_heads or self.num_heads, self.head_dim
        count = -(-length // (self.block * self.stride))
        M = self.block * (self.local + count)
        zeros = jnp.zeros((batch, M, K, H), self.dtype or jnp.float32)
        return ShardedCache(zeros, zeros, jnp.full((M, K), -1), jnp.zeros((), jnp.int32))

    def extend(
        self, state: ShardedCache, x: Float[Array, "B T D"]
    ) -> tuple[ShardedCache, Float[Array, "B T D"]]:
        """The next T tokens, which see the cache and each other: T (M + T) scores at once."""
        t = state.length + jnp.arange(x.shape[1])
        q, k, v = self._project(x, t)
        join = functools.partial(jnp.concatenate, axis=1)
        keys, values = join([state.k, k.astype(state.k.dtype)]), join([state.v, v])
        s = jnp.broadcast_to(t[:, None], (len(t), k.shape[2]))
        positions = t, jnp.concatenate([state.at, s])
        o = self.attend(q, keys, values, positions=positions, **self._sizes)
        return state.append(k, v, **self._sizes), self.out(o, x.shape[-1])

    @property
    def _sizes(self):
        return dict(block=self.block, local=self.local, stride=self.stride)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k[:, :, :2], v=v[:, :, :2])


def _oracle(q, k, v, *, block=64, local=16, stride=8, mask=None):
    (T, N), K = q.shape[1:3], k.shape[2]
    seen = np.zeros((N, T, T), bool)
    for n, t, s in np.ndindex(N, T, T):
        far = (s // block + n * K // N * max(1, stride // K) + 1) % stride == 0
        seen[n, t, s] = s <= t and (t // block - s // block < local or far)
    k, v = (jnp.repeat(x, N // K, 2) for x in (k, v))
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    return jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(jnp.where(seen[None], x, -1e30)), v)


SPEC = registry.Mechanism(
    fn=s2_attention,
    module=S2Attention,
    small=dict(num_heads=4, head_dim=8, num_kv_heads=2, block=1, local=2, stride=2),
    papers=("s2-attention",),
    example=_example,
    oracle=_oracle,
    variants=(dict(block=4, local=2, stride=4), dict(block=16, local=1, stride=3)),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.STREAMABLE,
            Claim.DENSE_TWIN,
            Claim.LINEAR_MEMORY,
            Claim.FORWARD_MODE,
        }
    ),
)
