r"""HiP attention: a search down a binary tree of chunks finds the keys that a query looks at most.

Paper: Lee et al., "HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention
Pruning", arXiv:2406.09827, section 3 and algorithm 1.

For each block of queries that ends before position e, and each head:

    chunks  = A parts of the blocks of keys before e, as even as can be,       A = budget / C
    repeat  each chunk is cut into two halves, which score max_{t in block} q_t . k_centre;
            the best A are kept                                until every chunk is one block
    o_t     = attention of q_t to the keys up to t of the A blocks

So log2(e / budget) rounds of 2A products find the blocks: O(T log T) for all queries, and memory is
linear in T. It relies on neighbouring keys being alike. The chunks of the first key and of the
query block itself always stay, so that no query is left without a key. budget >= T is full causal
attention.

Shapes: B batch, T queries, S keys, N heads, K kv-heads, G = N/K, H head dim, V value dim, C keys of
a block, A blocks that are kept, M = A C.
Unlike the paper: the centre of a chunk stands for it at every round, and the mask is found anew for
every query block when decoding. A block of queries chooses as one, so an output depends on later
tokens of its block (through the choice alone): for block_q > 1 that is neither causal nor
streamable.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from attnjax.core import attention, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import blocked_arguments


def hip_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: masks.Mask | None = None,
    budget: int = 512,
    block_q: int = 32,
    block_k: int = 2,
    q_offset: int | Int[Array, ""] = 0,
) -> Float[Array, "B T N V"]:
    """Each query sees no later keys; in v's dtype.

    Args:
      mask: honours Causal, which holds anyway; NotImplementedError for others.
      budget: M, a multiple of block_k and at least block_q + 3 block_k.
      q_offset: position of the first query; keys begin at 0.

    Raises ValueError for options that don't fit.
    """
    masks.select(mask, masks.Causal, by="hip_attention")
    T, S, N = q.shape[1], k.shape[1], q.shape[2]
    _check(budget, block_q, block_k)
    tiles = masks.tile_positions(np.arange(T), min(block_q, T))
    fixed = lax.stop_gradient(k)

    @jax.checkpoint
    def attend(tile):
        rows, t = q[:, tile].astype(jnp.float32), q_offset + tile
        chosen = search(lax.stop_gradient(rows), fixed, t, budget=budget, block_k=block_k)
        at = chosen[..., None] * block_k + jnp.arange(block_k)[None, None, None]
        at = at.reshape(*chosen.shape[:2], -1)
        keys, values = (_take(x, at, N) for x in (k, v))
        x = jnp.einsum("BCNH,BNMH->BNCM", rows, keys) * q.shape[-1] ** -0.5
        seen = (at[:, :, None] <= t[None, None, :, None]) & (at < S)[:, :, None]
        return jnp.einsum("BNCM,BNMV->CBNV", jax.nn.softmax(jnp.where(seen, x, -1e30)), values)

    o = lax.map(attend, jnp.asarray(tiles))
    return o.reshape(-1, *o.shape[2:])[:T].swapaxes(0, 1).astype(v.dtype)


def search(
    q: Float[Array, "B C N H"],
    k: Float[Array, "B S K H"],
    t: Int[Array, "C"],
    *,
    budget: int = 512,
    block_k: int = 2,
) -> Int[Array, "B N A"]:
    """The blocks of keys that a block of queries at the positions t attends to, no two the same.

    Where fewer lie before its end they are all there, and later ones beside.
    """
    (B, _, N, _), S = q.shape, k.shape[1]
    L = -(-S // block_k)
    A = min(budget // block_k, L)
    before = jnp.maximum(t[-1] // block_k + 1, A)
    edges = jnp.broadcast_to(jnp.arange(A + 1) * before // A, (B, N, A + 1))
    edges = blocked_arguments.varying(edges, like=(q, k, t))

    def halve(_, chunks):
        low, high = chunks
        middle = (low + high + 1) // 2  # of a single block the second half is empty
        low, high = (jnp.concatenate(x, -1) for x in ((low, middle), (middle, high)))
        centre = _take(k, (low + high) * block_k // 2, N)
        score = jnp.einsum("BCNH,BNMH->BNMC", q.astype(jnp.float32), centre).max(-1)
        stays = (low == 0) | ((low * block_k <= t[-1]) & (high * block_k > t[0]))
        score = jnp.where(low < high, jnp.where(stays, jnp.inf, score), -jnp.inf)
        best = lax.top_k(score, A)[1]
        return tuple(jnp.take_along_axis(x, best, -1) for x in (low, high))

    rounds = (-(-L // A) - 1).bit_length()
    return lax.fori_loop(0, rounds, halve, (edges[..., :-1], edges[..., 1:]))[0]


def _take(x, at, N):
    """The tokens `at` (B N M) of x (B S K H) for N query heads, in float32."""
    b, n = jnp.arange(len(x))[:, None, None], jnp.arange(N)[None, :, None]
    at = jnp.minimum(at, x.shape[1] - 1)
    return x[b, at, n // (N // x.shape[2])].astype(jnp.float32)


def _check(budget, block_q, block_k):
    if block_q < 1 or block_k < 1:
        raise ValueError(f"{block_q=} and {block_k=} must be at least 1")
    if budget % block_k or budget < block_q + 3 * block_k:
        raise ValueError(
            f"{budget=} must be a multiple of {block_k=} and at least {block_q + 3 * block_k}"
        )


class HipAttention(attention.KeyValueAttention):
    """Causal attention over (B T D) to `budget` keys. Each call of `extend` cuts its own blocks."""

    budget: int = 512
    block_q: int = 32
    block_k: int = 2
    fn: Callable[..., jax.Array] = hip_attention

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself."""
        q, k, v = self._project(x, jnp.arange(x.shape[1]))
        return self.out(self.attend(q, k, v, mask=mask, **self._options), x.shape[-1])

    def extend(self, state, x):
        """The next T tokens, which search the keys up to them."""
        start = state.length
        q, k, v = self._project(x, start + jnp.arange(x.shape[1]))
        state = state.append(k, v)
        o = self.attend(q, state.k, state.v, q_offset=start, **self._options)
        return state, self.out(o, x.shape[-1])

    @property
    def _options(self):
        return dict(budget=self.budget, block_q=self.block_q, block_k=self.block_k)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k[:, :, :2], v=v[:, :, :2])


def _oracle(q, k, v, *, budget=512, block_q=32, block_k=2):
    """A dense mask; query block by query block, with all scores known."""
    B, T, N, H = q.shape
    k, v = (jnp.repeat(x, N // k.shape[2], 2) for x in (k, v))
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(H)
    seen = []
    for first in range(0, T, block_q):
        last = min(first + block_q, T) - 1
        peak, blocks, A = x[:, :, first : last + 1].max(2), last // block_k + 1, budget // block_k
        parts = np.arange(min(A, blocks) + 1) * blocks // min(A, blocks)
        chunks = jnp.broadcast_to(np.stack([parts[:-1], parts[1:]], -1), (B, N, len(parts) - 1, 2))
        for _ in range(10 if blocks > A else 0):
            a, b = chunks[..., 0], chunks[..., 1]
            m = a + (b - a + 1) // 2
            halves = jnp.stack([a, m, m, b], -1).reshape(B, N, -1, 2)
            a, b = halves[..., 0], halves[..., 1]
            value = jnp.take_along_axis(peak, jnp.minimum((a + b) * block_k // 2, T - 1), -1)
            own = (a * block_k <= last) & (b * block_k > first)
            value = jnp.where(a == b, -1e30, jnp.where((a == 0) | own, 1e30, value))
            order = jnp.argsort(-value, axis=-1)[..., : min(A, blocks), None]
            chunks = jnp.take_along_axis(halves, order, 2)
        number = np.arange(T)[None, None, None] // block_k
        member = (chunks[..., :1] <= number) & (number < chunks[..., 1:])
        past = np.arange(T)[None] <= np.arange(first, last + 1)[:, None]
        seen.append(member.any(2)[:, :, None] & past[None, None])
    x = jnp.where(jnp.concatenate(seen, 2), x, -1e30)
    return jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(x), v)


SPEC = registry.Mechanism(
    fn=hip_attention,
    module=HipAttention,
    small=dict(num_heads=4, head_dim=8, num_kv_heads=2, budget=5, block_q=2, block_k=1),
    papers=("hip-attention",),
    example=_example,
    oracle=_oracle,
    variants=(
        {},
        dict(budget=20, block_q=8, block_k=2),
        dict(budget=24, block_q=16, block_k=1),
    ),
    claims=frozenset({Claim.DENSE_TWIN, Claim.LINEAR_MEMORY, Claim.CONTEXT_PARALLEL}),
    context=("all_to_all",),
)
