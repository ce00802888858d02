r"""SeerAttention: a small gate, taught by full attention, chooses the blocks that are attended to.

Paper: Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
arXiv:2410.13276, section 3.

    a_i  = rope(W_q  mean_{t in query block i} q_t)
    c_j  = rope(W_k [max_s k_s, min_s k_s, mean_s k_s])      over the s in block j of keys
    g_ij = softmax over j of a_i . c_j / sqrt(E)             what the gate thinks of block j
    o_t  = attention of q_t to the keys up to t in its own block and the topk - 1 earlier ones of
           highest g_ij, i being the query block of t

W_q and W_k are each head's own; q and k are not rotated yet when they are pooled, and a_i and c_j
are rotated as the first token of their block. The choice has no gradient: the gate learns from
`distillation_loss`, its cross-entropy against

    m_ij = max of the weights of full attention within blocks i and j, normalised over j,

which gives no gradient to anything but W_q and W_k. Attention costs about topk block products a
query, the gate one product of E numbers for each block; memory is linear in T.

Shapes: B batch, T queries, S keys, N heads, K kv-heads, H head dim, V value dim, E gate dim,
C keys of a block, L blocks of keys, I blocks of queries.
Unlike the paper: a block of keys that isn't full has no gate, so a query's own block is always
read; a query block is one query unless `query_block` says more, since a choice for several queries
depends on the last of them, and can't be made token by token; topk blocks, where the paper also
has a threshold.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnjax.core import attention, decode, layers, masks, positions, registry
from attnjax.core.registry import Claim
from attnjax.ops import auxiliary_loss, best_blocks, block_selection
from attnjax.ops import selected_block_attention as blocks


def seerattention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    gate_q: Float[Array, "B I N E"],
    gate_k: Float[Array, "B L K E"],
    *,
    mask: masks.Mask | None = None,
    block: int = 64,
    topk: int = 16,
    query_block: int = 1,
    distill: float = 0.0,
    q_offset: int | Int[Array, ""] = 0,
    implementation: blocks.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """o in v's dtype; always causal.

    Args:
      gate_q, gate_k: a and c, with the whole softmax over j left to be done.
      mask: honours Valid and Causal; NotImplementedError for others.
      block: C.
      topk: blocks that a query and head reads, with its own.
      query_block: queries that share a choice.
      distill: weight of `distillation_loss`, which is added to any gradient; 0 is none.
      q_offset: position of the first query, a multiple of query_block; keys begin at 0.
      implementation: of the attention, as in `ops.selected_block_attention`.

    Raises ValueError for a block or topk below 1, a query_block that doesn't divide block, and
    gates of another number of blocks.
    """
    if block < 1 or topk < 1 or query_block < 1 or block % query_block:
        raise ValueError(f"{block=} and {topk=} must be at least 1, {query_block=} divide {block=}")
    _check_gates(q, k, gate_q, gate_k, block, query_block)
    filled = block_selection.by_block(_seen(mask, k), block).any(2)
    at = (q_offset + query_block * jnp.arange(gate_q.shape[1])) // block
    chosen = best_blocks.best_blocks(gate_q, gate_k, filled, at, count=topk, own=True)
    seen = masks.Causal() if mask is None else mask & masks.Causal()
    sizes = dict(block=block, query_block=query_block)
    options = dict(mask=seen, q_offset=q_offset, implementation=implementation)
    o = blocks.selected_block_attention(q, k, v, chosen, **sizes, **options)
    if not distill:
        return o
    loss = distillation_loss(q, k, gate_q, gate_k, mask=mask, q_offset=q_offset, **sizes)
    return auxiliary_loss.attach(o, distill * loss)


def _check_gates(q, k, gate_q, gate_k, block, query_block):
    wanted = -(-q.shape[1] // query_block), -(-k.shape[1] // block)
    if (gate_q.shape[1], gate_k.shape[1]) != wanted:
        raise ValueError(f"gates {gate_q.shape}, {gate_k.shape} must be of {wanted} blocks")


def _seen(mask, k):
    """Keys (B S) that the mask leaves to any query."""
    _, valid = masks.select(mask, masks.Causal, masks.Valid, by="seerattention")
    return functools.reduce(jnp.logical_and, (x.keys for x in valid), jnp.ones(k.shape[:2], bool))


def distillation_loss(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    gate_q: Float[Array, "B I N E"],
    gate_k: Float[Array, "B L K E"],
    *,
    mask: masks.Mask | None = None,
    block: int = 64,
    query_block: int = 1,
    q_offset: int | Int[Array, ""] = 0,
) -> Float[Array, ""]:
    """Cross-entropy of g against m, a mean over blocks of queries. q and k are constants to it.

    A query block that sees nothing counts 0, and so does one after the last key. O(T S) memory, as
    m needs the weights of all keys.
    """
    _check_gates(q, k, gate_q, gate_k, block, query_block)
    (T, N), (S, K) = q.shape[1:3], k.shape[1:3]
    q, k = jax.lax.stop_gradient((q, k))
    seen = masks.dense(masks.Causal(), T, S, q_offset=q_offset) & _seen(mask, k)[:, None, None]
    seen &= (q_offset + jnp.arange(T) < S)[None, None, :, None]  # else it only fills up
    score = lambda q, k: jnp.einsum(
        "BTNH,BSNH->BNTS", q, jnp.repeat(k, N // K, 2), preferred_element_type=jnp.float32
    )
    w = jax.nn.softmax(jnp.where(seen, score(q, k) / q.shape[-1] ** 0.5, -1e30))
    m = _most(jnp.where(seen, w, 0), query_block, block)
    m = m / jnp.maximum(m.sum(-1, keepdims=True), 1e-30)
    g = score(gate_q, gate_k) / gate_q.shape[-1] ** 0.5
    log_g = jax.nn.log_softmax(jnp.where(_most(seen, query_block, block), g, -1e30))
    return -jnp.mean(jnp.sum(m * log_g, -1))


def _most(x, rows, columns):
    """The most of each block of (... T S): (... I L)."""
    *lead, T, S = x.shape
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, -T % rows), (0, -S % columns)])
    return x.reshape(*lead, x.shape[-2] // rows, rows, -1, columns).max((-3, -1))


def pools(
    k: Float[Array, "B S K H"], seen: Bool[Array, "B S"], block: int
) -> Float[Array, "B L K F"]:
    """Greatest, least and mean (F = 3H) of the `seen` keys of each block; 0 where none is."""
    mean = block_selection.means(k, block, seen)
    k = block_selection.by_block(k.astype(jnp.float32), block)
    seen = block_selection.by_block(seen, block)[..., None, None]
    high = jnp.max(jnp.where(seen, k, -jnp.inf), 2)
    low = jnp.min(jnp.where(seen, k, jnp.inf), 2)
    return jnp.where(seen.any(2), jnp.concatenate([high, low, mean], -1), 0.0)


def gate(
    x: Float[Array, "B L N F"],
    weight: Float[Array, "N F E"],
    size: int,
    base: float | None,
    start=0,
) -> Float[Array, "B L N E"]:
    """W x, in float32, rotated as tokens start, start + size, ...; x is a constant to it."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    y = jnp.einsum("BLNF,NFE->BLNE", x, weight)
    if base is None:
        return y
    return positions.rotary(y, start + size * jnp.arange(x.shape[1]), base=base)


class GateCache(NamedTuple):
    """Keys and values seen so far, and what `pools` says of the keys before their rotation."""

    tokens: decode.KVCache
    high: Float[Array, "B L K H"]
    low: Float[Array, "B L K H"]
    total: Float[Array, "B L K H"]

    def append(self, rotated, k, v) -> "GateCache":
        """The cache with T more tokens."""
        at = (self.tokens.length + jnp.arange(k.shape[1])) // self._block
        k = k.astype(jnp.float32)
        high, low = self.high.at[:, at].max(k), self.low.at[:, at].min(k)
        return GateCache(self.tokens.append(rotated, v), high, low, self.total.at[:, at].add(k))

    @property
    def _block(self):
        return self.tokens.k.shape[1] // self.high.shape[1]

    @property
    def pools(self) -> Float[Array, "B L K F"]:
        """As the function `pools` of all keys, for the blocks that are full."""
        full = jnp.arange(1, self.high.shape[1] + 1) * self._block <= self.tokens.length
        x = jnp.concatenate([self.high, self.low, self.total / self._block], -1)
        return jnp.where(full[None, :, None, None], x, 0.0)


class SeerAttention(attention.KeyValueAttention):
    """Attention over (B T D) to the `topk` blocks that a gate chooses. Always causal.

    The gate learns along with whatever is trained, by `distill` times its own loss.
    """

    gate_dim: int = 128
    block: int = 64
    topk: int = 16
    query_block: int = 1
    distill: float = 1.0
    fn: Callable[..., jax.Array] = seerattention

    def setup(self):
        super().setup()
        N, K, H, E = (
            self.num_heads,
            self.num_kv_heads or self.num_heads,
            self.head_dim,
            self.gate_dim,
        )
        init = nn.initializers.lecun_normal(batch_axis=0)
        self.gate_query = layers.Table((N, H, E), init)
        self.gate_key = layers.Table((K, 3 * H, E), init)

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says which tokens are Valid."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        gates = self._gates(q, pools(k, _seen(mask, k), self.block), 0)
        q, k = self._rotate(q, 0), self._rotate(k, 0)
        options = dict(mask=mask, query_block=self.query_block, distill=self.distill)
        o = self.attend(q, k, v, *gates, block=self.block, topk=self.topk, **options)
        return self.out(o, x.shape[-1])

    def init_state(self, batch: int, length: int) -> GateCache:
        """An empty cache for `length` tokens, in whole blocks."""
        if self.query_block > 1:
            raise NotImplementedError(f"query_block={self.query_block} can't be streamed; 1 can")
        count = -(-length // self.block)
        tokens = super().init_state(batch, count * self.block)
        zeros = jnp.zeros((batch, count, *tokens.k.shape[2:]), jnp.float32)
        return GateCache(tokens, zeros - jnp.inf, zeros + jnp.inf, zeros)

    def extend(
        self, state: GateCache, x: Float[Array, "B T D"]
    ) -> tuple[GateCache, Float[Array, "B T D"]]:
        """The next T tokens, each of which chooses blocks by the gates of those that are full."""
        start = state.tokens.length
        q, k, v = self.query(x), self.key(x), self.value(x)
        state = state.append(self._rotate(k, start), k, v)
        gates = self._gates(q, state.pools, start)
        options = dict(block=self.block, topk=self.topk, q_offset=start)
        tokens = state.tokens
        o = self.attend(self._rotate(q, start), tokens.k, tokens.v, *gates, **options)
        return state, self.out(o, x.shape[-1])

    def _gates(self, q, pooled, start):
        q = block_selection.means(q, self.query_block)
        base = self.rotary_base
        gate_q = gate(q, self.gate_query(), size=self.query_block, base=base, start=start)
        return gate_q, gate(pooled, self.gate_key(), size=self.block, base=base)

    def _rotate(self, x, start):
        if self.rotary_base is None:
            return x
        return positions.rotary(x, start + jnp.arange(x.shape[1]), base=self.rotary_base)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    gate_q, gate_k = jax.random.normal(jax.random.fold_in(key, 1), (2, 2, T, 4, 6))
    k, v, gate_k = k[:, :, :2], v[:, :, :2], gate_k[:, : -(-T // 64), :2]
    return dict(q=q, k=k, v=v, gate_q=gate_q, gate_k=gate_k)


def _oracle(q, k, v, gate_q, gate_k, *, mask=None, block=64, topk=16):
    S, N = k.shape[1], q.shape[2]
    k, v, gate_k = (jnp.repeat(x, N // x.shape[2], 2) for x in (k, v, gate_k))
    g = jnp.einsum("BTNE,BLNE->BNTL", *jax.lax.stop_gradient((gate_q, gate_k)))
    own, blocks = (jnp.arange(n) for n in (S, gate_k.shape[1]))
    own = own[:, None] // block
    g = jnp.where(blocks[None] < own, g, jnp.where(blocks[None] == own, jnp.inf, -jnp.inf))
    chosen = (g[..., None, :] > g[..., :, None]).sum(-1) < topk
    seen = chosen[..., jnp.arange(S) // block] & masks.dense(masks.Causal(), S, S)
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    return jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(jnp.where(seen, x, -1e30)), v)


SPEC = registry.Mechanism(
    fn=seerattention,
    module=SeerAttention,
    small=dict(num_heads=4, head_dim=8, num_kv_heads=2, gate_dim=6, block=2, topk=2),
    papers=("seerattention",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(topk=1, mask=masks.Causal())),
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
    context=("gather", "all_to_all", "block_ring"),
)
