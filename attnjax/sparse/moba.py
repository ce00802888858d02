r"""Mixture of block attention: a query attends to the few blocks of keys that look most like it.

Paper: Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv:2502.13189,
eqs. 2 to 6 and section 2.2.

    s_ti = q_t . mean_{s in block i} k_s,           inf for the block of t, -inf for later ones
    o_t  = attention of q_t to the keys up to t in the topk blocks of highest s_ti

Blocks are chosen for each query and head, without a gradient. Where topk is the number of blocks
this is full causal attention, with the same parameters. Attention costs about (topk + 1) block
products a query; the gate costs one for each block, with memory linear in T.

Shapes: B batch, T queries, S keys, N heads, K kv-heads, H head dim, V value dim, C keys of a block,
L blocks, A = topk blocks of a query.
Unlike the paper: keys that `Valid` hides count in no mean.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnjax.core import attention, decode, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import selected_block_attention as blocks


def moba(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: masks.Mask | None = None,
    block: int = 512,
    topk: int = 3,
    means: Float[Array, "B L K H"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    implementation: blocks.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """Always causal; the current block is one of the topk.

    Args:
      mask: honours Valid and Causal; NotImplementedError for others.
      means: those of the keys of each finished block, where they are known already: then a single
        query reads no other keys than it attends to.
      q_offset: position of the first query; keys begin at 0.
      implementation: of the attention, as in `ops.selected_block_attention`.

    Raises ValueError for a block or topk below 1.
    """
    if block < 1 or topk < 1:
        raise ValueError(f"{block=} and {topk=} must be at least 1")
    block = min(block, k.shape[1])
    seen = _seen(mask, k)
    if means is None:
        means = _means(k, seen, block)
    filled = blocks.cut(seen, block).any(2)
    at = (q_offset + jnp.arange(q.shape[1])) // block
    selected = _select(*jax.lax.stop_gradient((q, means)), filled, at, topk, chunk=block)
    mask = masks.Causal() if mask is None else mask & masks.Causal()
    options = dict(mask=mask, q_offset=q_offset, implementation=implementation)
    return blocks.selected_block_attention(q, k, v, selected, block=block, **options)


def _seen(mask, k):
    """Keys (B S) that the mask leaves to any query."""
    _, valid = masks.select(mask, masks.Causal, masks.Valid, by="moba")
    return functools.reduce(jnp.logical_and, (x.keys for x in valid), jnp.ones(k.shape[:2], bool))


def _means(k, seen, block):
    """Means (B L K H) of the keys that are `seen` (B S), by block."""
    k = jnp.where(seen[..., None, None], k.astype(jnp.float32), 0.0)
    count = jnp.maximum(blocks.cut(seen, block).sum(2), 1)
    return blocks.cut(k, block).sum(2) / count[..., None, None]


def _select(q, means, filled, at, topk, chunk):
    """Blocks (B T N A) for queries q (B T N H) that lie in the blocks `at` (T).

    A chunk of queries is taken at a time: the scores of all are T S / block numbers.
    """
    (B, T, N, H), (L, K) = q.shape, means.shape[1:3]

    def of_query(x):
        q, at = x
        q = q.reshape(B, K, N // K, H).astype(jnp.float32)
        past = filled[:, None, None] & (jnp.arange(L) < at)[None, None, None]
        score = jnp.where(past, jnp.einsum("BKGH,BLKH->BKGL", q, means), -jnp.inf)
        return jax.lax.top_k(score.at[..., at].set(jnp.inf), min(topk, L))[1].reshape(B, N, -1)

    return jax.lax.map(of_query, (q.swapaxes(0, 1), at), batch_size=min(chunk, T)).swapaxes(0, 1)


class BlockCache(NamedTuple):
    """Keys and values seen so far, and the sum of keys of each block, in float32."""

    tokens: decode.KVCache
    sums: Float[Array, "B L K H"]

    @property
    def means(self) -> Float[Array, "B L K H"]:
        """Means of the keys of the blocks that are full."""
        return self.sums / self._block

    @property
    def _block(self):
        return self.tokens.k.shape[1] // self.sums.shape[1]

    def append(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K V"]) -> "BlockCache":
        """The cache with T more tokens."""
        at = (self.tokens.length + jnp.arange(k.shape[1])) // self._block
        sums = self.sums.at[:, at].add(k.astype(jnp.float32))
        return BlockCache(self.tokens.append(k, v), sums)


class MoBA(attention.KeyValueAttention):
    """Attention over (B T D) to the `topk` best blocks of `block` tokens. Always causal."""

    block: int = 512
    topk: int = 3
    fn: Callable[..., jax.Array] = moba

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says which tokens are Valid."""
        q, k, v = self._project(x, jnp.arange(x.shape[1]))
        o = self.attend(q, k, v, mask=mask, block=self.block, topk=self.topk)
        return self.out(o, x.shape[-1])

    def init_state(self, batch: int, length: int) -> BlockCache:
        """An empty cache for `length` tokens, in whole blocks."""
        block = min(self.block, length)
        count = -(-length // block)
        tokens = super().init_state(batch, count * block)
        shape = (batch, count, *tokens.k.shape[2:])
        return BlockCache(tokens, jnp.zeros(shape, jnp.float32))

    def extend(
        self, state: BlockCache, x: Float[Array, "B T D"]
    ) -> tuple[BlockCache, Float[Array, "B T D"]]:
        """The next T tokens, each of which chooses blocks by the keys in the cache."""
        start = state.tokens.length
        q, k, v = self._project(x, start + jnp.arange(x.shape[1]))
        state = state.append(k, v)
        arrays, at = (q, state.tokens.k, state.tokens.v), dict(means=state.means, q_offset=start)
        o = self.attend(*arrays, block=self.block, topk=self.topk, **at)
        return state, self.out(o, x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k[:, :, :2], v=v[:, :, :2])


def _oracle(q, k, v, *, mask=None, block=512, topk=3):
    T, S = q.shape[1], k.shape[1]
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], 2) for x in (k, v))
    block_of, count = jnp.arange(S) // block, -(-S // block)
    member = (jnp.arange(count)[:, None] == block_of[None, :]).astype(jnp.float32)
    means = jnp.einsum("LS,BSNH->BLNH", member / member.sum(1, keepdims=True), k)
    score = jnp.einsum("BTNH,BLNH->BNTL", q.astype(jnp.float32), means)
    lag = (jnp.arange(T) // block)[:, None] - jnp.arange(count)[None, :]
    score = jnp.where(lag > 0, score, jnp.where(lag == 0, jnp.inf, -jnp.inf)[None, None])
    better = (score[..., None, :] > score[..., :, None]).sum(-1)
    seen = (better < topk)[..., block_of] & masks.dense(masks.Causal(), T, S)
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    return jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(jnp.where(seen, x, -1e30)), v)


SPEC = registry.Mechanism(
    fn=moba,
    module=MoBA,
    small=dict(num_heads=4, head_dim=8, num_kv_heads=2, block=2, topk=2),
    papers=("moba",),
    example=_example,
    oracle=_oracle,
    variants=(dict(block=16, topk=2), dict(block=5, topk=4, mask=masks.Causal())),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.STREAMABLE,
            Claim.DENSE_TWIN,
            Claim.LINEAR_MEMORY,
            Claim.FUSED,
            Claim.CONTEXT_PARALLEL,
        }
    ),
    context=("block_ring", "gather"),
)
