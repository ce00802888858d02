r"""AnchorAttention: a column of keys is read where it comes near what first and local keys score.

Paper: Zhang et al., "AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity",
arXiv:2505.23520, section 3 and algorithms 1 to 3.

    x_ts  = q_t . k_s / sqrt(H)
    near  = the first block of keys, and those from the start of t's group of queries up to t
    a_t   = max_{s near} x_ts                                                        the anchor
    key s before the group is read by all of the group, if for any block b of its queries
            mean_{t in b}(q_t) . k_s / sqrt(H) + theta >= mean_{t in b}(a_t)
    o_t   = attention of q_t to the keys that are near or read

Nothing is sorted by score and single keys are chosen, not blocks: they are gathered, so that the
tiles of attention are full of them. theta=inf is full causal attention, theta=-inf only what is
near. Memory is linear in T.

Shapes: B batch, T tokens, N heads, K kv-heads, H head dim, V value dim, C tokens of a block,
L blocks of a group, g groups.
Unlike the paper: the scores of the anchor are computed once more in the attention itself. A block
of queries chooses as one, so an output depends on later tokens of its group (through the choice
alone): that is neither causal nor streamable. Tokens that follow a cache get full attention.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attnjax.core import attention, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import block_selection as blocks
from attnjax.ops import dot_product_attention as ops

_NOWHERE = np.iinfo(np.int32).max  # the position of a key that is not read: after every query


def anchorattention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: masks.Mask | None = None,
    theta: float = 12.0,
    block: int = 128,
    step: int = 16,
    q_offset: int | Int[Array, ""] = 0,
) -> Float[Array, "B T N V"]:
    """Attention of a prompt to itself, each query seeing no later keys; in v's dtype.

    Args:
      mask: honours Causal, which holds anyway; NotImplementedError for others.
      theta: how far below the anchor a score may be.
      block: C, queries that are averaged, and first keys.
      step: blocks of a group.
      q_offset: other than the int 0, the queries follow a cache and attention is full.

    Raises ValueError for a block or step below 1 and for a prompt with other keys than its own.
    """
    masks.select(mask, masks.Causal, by="anchorattention")
    if not (isinstance(q_offset, int) and q_offset == 0):
        return ops.dot_product_attention(q, k, v, mask=masks.Causal(), q_offset=q_offset)

    def attend(rows, keys, values, t):
        read = _read(*lax.stop_gradient((rows, keys)), t, theta, block)
        order = jnp.argsort(~read, stable=True)
        at = jnp.where(read[order], order, _NOWHERE)
        rows, keys, values = (x[None, :, None] for x in (rows, keys[order], values[order]))
        o = ops.dot_product_attention(rows, keys, values, mask=masks.Causal(), positions=(t, at))
        return o[0, :, 0]

    o = _by_group(attend, block, step, q, k, v)  # (B N g C*L V)
    return o.reshape(*o.shape[:2], -1, o.shape[-1]).swapaxes(1, 2)[:, : q.shape[1]]


def select(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    *,
    theta: float = 12.0,
    block: int = 128,
    step: int = 16,
) -> Bool[Array, "B N g T"]:
    """The keys that each group of queries reads, those after them included."""
    read = lambda rows, keys, t: _read(rows, keys, t, theta, block)
    return _by_group(read, block, step, q, k)


def _by_group(fn, block, step, q, *kv):
    """fn(queries (C*L H), keys (T H), ..., positions) for each batch entry, head and group."""
    if block < 1 or step < 1:
        raise ValueError(f"{block=} and {step=} must be at least 1")
    (B, T, N, _), K = q.shape, kv[0].shape[2]
    if kv[0].shape[1] != T:
        raise ValueError(f"q {q.shape} must be of the tokens of k {kv[0].shape}")
    size = block * min(step, -(-T // block))
    q = blocks.by_block(q, size)

    @jax.checkpoint  # or each group would keep its gathered keys
    def one(unit):
        b, n, g = unit
        t = g * size + jnp.arange(size)
        return fn(q[b, g, :, n], *(x[b, :, n // (N // K)] for x in kv), t)

    units = [x.reshape(-1) for x in jnp.indices((B, N, q.shape[1]))]
    out = lax.map(one, units)
    return out.reshape(B, N, -1, *out.shape[1:])


def _read(q, k, t, theta, block):
    """Whether a group of queries (C*L H) at the positions t reads each key of k (T H)."""
    T, exists = len(k), (t < len(k))[None]  # the last group is filled up
    q, k = q.astype(jnp.float32) * q.shape[-1] ** -0.5, k.astype(jnp.float32)
    own = lax.dynamic_slice_in_dim(jnp.pad(k, ((0, len(q)), (0, 0))), t[0], len(q))
    near = jnp.concatenate([k[:block], own])
    at = jnp.concatenate([jnp.arange(min(block, T)), t])

    def anchor(rows):
        q, t = rows
        return jnp.where(at[None] <= t[:, None], q @ near.T, -jnp.inf).max(-1)

    cut = lambda x: x.reshape(-1, block, *x.shape[1:])
    anchors = lax.map(anchor, (cut(q), cut(t))).reshape(1, -1, 1, 1)
    mean_q, mean_anchor = (blocks.means(x, block, exists)[0] for x in (q[None, :, None], anchors))
    hit = mean_q[:, 0] @ k.T + theta >= mean_anchor[:, :, 0]
    s = jnp.arange(T)
    return (s < block) | (s >= t[0]) | (hit & cut(exists[0]).any(1)[:, None]).any(0)


class AnchorAttention(attention.KeyValueAttention):
    """Causal attention over (B T D), sparse over a prompt and full where `extend` goes on."""

    theta: float = 12.0
    block: int = 128
    step: int = 16
    fn: Callable[..., jax.Array] = anchorattention

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself."""
        q, k, v = self._project(x, jnp.arange(x.shape[1]))
        options = dict(theta=self.theta, block=self.block, step=self.step)
        return self.out(self.attend(q, k, v, mask=mask, **options), x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k[:, :, :2], v=v[:, :, :2])


def _oracle(q, k, v, *, theta=12.0, block=128, step=16):
    T, N = q.shape[1:3]
    k, v = (jnp.repeat(x, N // k.shape[2], 2) for x in (k, v))
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    t, s = np.arange(T)[None, None, :, None], np.arange(T)[None, None, None]
    start = t // (block * step) * block * step
    near = ((s < block) | (s >= start)) & (s <= t)
    anchor = jnp.where(near, x, -1e30).max(-1)
    read = np.zeros((1, 1, T, T), bool)
    for first in range(0, T, block):
        rows = slice(first, first + block)
        mean = jnp.einsum("BNH,BSNH->BNS", q[:, rows].mean(1), k) / jnp.sqrt(q.shape[-1])
        hit = mean + theta >= anchor[:, :, rows].mean(-1, keepdims=True)
        read = read | (hit[:, :, None] & (start == start[:, :, first, None]))
    x = jnp.where(near | (read & (s <= t)), x, -1e30)
    return jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(x), v)


SPEC = registry.Mechanism(
    fn=anchorattention,
    module=AnchorAttention,
    small=dict(num_heads=4, head_dim=8, num_kv_heads=2, block=2, step=2, theta=0.0),
    papers=("anchorattention",),
    example=_example,
    oracle=_oracle,
    variants=(dict(block=4, step=3, theta=0.3), dict(block=8, step=2, theta=-0.3), {}),
    claims=frozenset(
        {Claim.DENSE_TWIN, Claim.LINEAR_MEMORY, Claim.FORWARD_MODE, Claim.CONTEXT_PARALLEL}
    ),
    context=("all_to_all",),
)
