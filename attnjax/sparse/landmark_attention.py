r"""Landmark attention: a block of tokens is seen through the token at its end, or not at all.

Paper: Mohtashami and Jaggi, "Landmark Attention: Random-Access Infinite Context Length for
Transformers", arXiv:2305.16300, section 3.1 and eqs. 1 to 4.

    x_ts = q_t . k_s / sqrt(H)
    g_ts = exp(x_ts) / sum_r exp(x_tr)      over the tokens up to t of t's block and the landmarks
                                            of earlier blocks, for s one of these
    h_ts = exp(x_ts) / sum_r exp(x_tr)      over the block of s without its landmark
    w_ts = g_ts in t's own block,    g_{t, landmark of s} h_ts in an earlier one,    0 at landmarks

The last token of each block is its landmark: a model puts a token of its own there. So the weight
of a whole block is known from one key, and a query and head reads only the topk earlier blocks of
highest weight; the others count as if they were not there. Weights of a query sum to 1. Attention
costs topk + 1 blocks a query, the landmarks one product for each block; memory is O(topk T).

Shapes: B batch, T queries, S keys, N heads, K kv-heads, H head dim, V value dim, C tokens of a
block with its landmark, L whole blocks, A = topk blocks of a query.
Unlike the paper: keys keep their positions, where the authors map those of blocks that were
retrieved to near ones (a model that was trained on short texts needs that); a block whose landmark
is hidden can't be retrieved. The paper trains with all blocks, topk=None.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnjax.core import attention, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import best_blocks
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import selected_block_attention as blocks


def landmark_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: masks.Mask | None = None,
    block: int = 64,
    topk: int | None = 4,
    q_offset: int | Int[Array, ""] = 0,
    implementation: blocks.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """Always causal; sum_s w_ts v_s in v's dtype.

    Args:
      mask: honours Valid and Causal; NotImplementedError for others.
      block: C, with the landmark.
      topk: earlier blocks that a query and head reads; None is all.
      q_offset: position of the first query; keys begin at 0.
      implementation: of the attention to earlier blocks, as in `ops.selected_block_attention`.

    Raises ValueError for a block below 2 and a topk below 1.
    """
    if block < 2 or (topk is not None and topk < 1):
        raise ValueError(f"{block=} must be at least 2 and {topk=} at least 1 or None")
    _, valid = masks.select(mask, masks.Causal, masks.Valid, by="landmark_attention")
    seen = functools.reduce(jnp.logical_and, (x.keys for x in valid), jnp.ones(k.shape[:2], bool))
    words = seen & (jnp.arange(k.shape[1]) % block < block - 1)[None]
    o, lse = _own_block(q, k, v, words, block, q_offset)
    marks = k[:, block - 1 :: block]
    if not (L := marks.shape[1]):
        return o.astype(v.dtype)
    usable = seen[:, block - 1 :: block] & blocks.cut(words, block)[:, :L].any(2)
    at = (q_offset + jnp.arange(q.shape[1])) // block
    chosen = best_blocks.best_blocks(q, marks, usable, at, count=topk or L, own=False)
    gate = _scores(q, marks, usable, at, chosen)
    x = jnp.concatenate([lse[..., None], gate], -1)
    share = jax.nn.softmax(jnp.maximum(x, -1e30), -1)  # all may be -inf, which gives NaN
    share = jnp.where(x > -jnp.inf, share, 0)
    pieces = _blocks(q, k, v, words, chosen, block=block, implementation=implementation)
    o = share[..., :1] * o + jnp.einsum("BTNA,BTANV->BTNV", share[..., 1:], pieces)
    return o.astype(v.dtype)


def _own_block(q, k, v, words, block, start):
    """Attention of each query to the `words` (B S) up to it in its block, and lse (B T N).

    The queries are shifted to where their blocks begin, so that only pairs of a block are computed.
    """
    T, shift = q.shape[1], start % block
    room = T + block

    def keys(x):
        x = jnp.pad(x, [(0, 0), (0, room), *[(0, 0)] * (x.ndim - 2)])
        return blocks.cut(jax.lax.dynamic_slice_in_dim(x, start - shift, room, 1), block)

    place = jnp.zeros((q.shape[0], room, *q.shape[2:]), q.dtype)
    place = blocks.cut(jax.lax.dynamic_update_slice_in_dim(place, q, shift, 1), block)
    attend = lambda q, k, v, words: ops.dot_product_attention(
        q, k, v, mask=masks.Causal() & masks.Valid(words), return_lse=True
    )
    pieces = jax.vmap(attend, 1, 1)(place, keys(k), keys(v.astype(jnp.float32)), keys(words))
    join = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
    return [jax.lax.dynamic_slice_in_dim(join(x), shift, T, 1) for x in pieces]


def _scores(q, marks, usable, at, chosen):
    """x (B T N A) of the landmarks of the chosen blocks; -inf for those that may not be seen."""
    b, n = jnp.arange(q.shape[0])[:, None, None, None], jnp.arange(q.shape[2])[None, None, :, None]
    marks = marks[b, chosen, n // (q.shape[2] // marks.shape[2])].astype(jnp.float32)
    x = jnp.einsum("BTNH,BTNAH->BTNA", q.astype(jnp.float32), marks) * q.shape[-1] ** -0.5
    return jnp.where(usable[b, chosen] & (chosen < at[None, :, None, None]), x, -jnp.inf)


def _blocks(q, k, v, words, chosen, **options):
    """Attention (B T A N V) of each query to the `words` of each of its blocks by itself."""
    B, T, N, A = chosen.shape
    each = chosen.swapaxes(2, 3).reshape(B, T * A, N, 1)
    q, v = jnp.repeat(q, A, 1), v.astype(jnp.float32)
    o = blocks.selected_block_attention(q, k, v, each, mask=masks.Valid(words), **options)
    return o.reshape(B, T, A, N, -1)


class LandmarkAttention(attention.KeyValueAttention):
    """Attention over (B T D) whose every `block`-th token is a landmark. Always causal."""

    block: int = 64
    topk: int | None = 4
    fn: Callable[..., jax.Array] = landmark_attention

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says which tokens are Valid."""
        q, k, v = self._project(x, jnp.arange(x.shape[1]))
        o = self.attend(q, k, v, mask=mask, block=self.block, topk=self.topk)
        return self.out(o, x.shape[-1])

    def extend(self, state, x):
        """The next T tokens, which read their own block and those that they retrieve."""
        start = state.length
        q, k, v = self._project(x, start + jnp.arange(x.shape[1]))
        state = state.append(k, v)
        options = dict(block=self.block, topk=self.topk, q_offset=start)
        return state, self.out(self.attend(q, state.k, state.v, **options), x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k[:, :, :2], v=v[:, :, :2])


def _oracle(q, k, v, *, block=64, topk=4):
    T, S = q.shape[1], k.shape[1]
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], 2) for x in (k, v))
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    t, s = jnp.arange(T)[None, None, :, None], jnp.arange(S)[None, None, None, :]
    mark, before = s % block == block - 1, s // block < t // block
    own = (s // block == t // block) & (s <= t) & ~mark
    better = (x[..., None, :] > x[..., :, None]) & (mark & before)[..., None, :]
    retrieved = mark & before & (better.sum(-1) < (topk or S))
    g = jax.nn.softmax(jnp.where(own | retrieved, x, -1e30))
    same = (s[..., None, :] // block == s[..., :, None] // block) & ~mark[..., None, :]
    inner = jnp.where(same, x[..., None, :], -1e30)
    h = jnp.exp(x - jax.nn.logsumexp(inner, -1))
    of_mark = g[..., jnp.minimum(s[0, 0, 0] // block * block + block - 1, S - 1)]
    w = jnp.where(own, g, jnp.where(before & ~mark, of_mark * h, 0))
    return jnp.einsum("BNTS,BSNV->BTNV", w, v)


SPEC = registry.Mechanism(
    fn=landmark_attention,
    module=LandmarkAttention,
    small=dict(num_heads=4, head_dim=8, num_kv_heads=2, block=3, topk=1),
    papers=("landmark-attention",),
    example=_example,
    oracle=_oracle,
    variants=(dict(block=8, topk=2), dict(block=5, topk=None)),
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
    context=("gather",),
)
