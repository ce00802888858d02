r"""SALE: products of 4 bits look at every pair, and say which blocks are worth exact attention.

Paper: Ji et al., "SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM
Prefilling", arXiv:2505.24179, section 3, and the kernels of the authors' code.

    k'_s   = k_s - mean(k),    q'_t = q_t - mean(q)                which makes the rest small
    x'_ts  = (bits(q'_t) . bits(k'_s) + mean(q) . k'_s) / sqrt(H)          estimate of a score
    lse_t  = log sum_s exp(q_t . k'_s / sqrt(H))       over the first block of keys and local ones
    a pair of blocks is computed if it is first or local, or if for any t, s <= t in it
             exp(x'_ts) / exp(lse_t) > threshold                 the relative attention score
    o_t    = attention of q_t to the keys of these blocks

bits(x) are whole numbers from -7 to 7 times one scale for each token. A single loud key in a quiet
block is found, which a mean over the block would hide. threshold=0 is full causal attention.

Shapes: B batch, T tokens, N heads, K kv-heads, H head dim, V value dim, C queries of a block,
tq tk blocks of queries and of keys.
Unlike the paper: thresholds are given, not found head by head on samples; the exact part has
full precision; local keys are whole blocks. A block of queries chooses as one, so an output depends
on later tokens of its block, and on all through the means (through the choice alone): that is
neither causal nor streamable. Tokens that follow a cache get full attention.
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

Threshold = float | tuple[float, ...] | Float[Array, "N"]

_LARGEST = 7  # of 4 bits with a sign


def sale(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: masks.Mask | None = None,
    threshold: Threshold = 0.004,
    block_q: int = 64,
    block_k: int = 32,
    local: int = 128,
    q_offset: int | Int[Array, ""] = 0,
) -> Float[Array, "B T N V"]:
    """Attention of a prompt to itself, each query seeing no later keys; in v's dtype.

    Args:
      mask: honours Causal, which holds anyway; NotImplementedError for others.
      threshold: one for all heads, or one for each; as an array it can be split with them.
      local: keys before the first query of a block whose blocks are always computed.
      q_offset: other than the int 0, the queries follow a cache and attention is full.

    Raises ValueError for options out of range and for a prompt with other keys than its own.
    """
    masks.select(mask, masks.Causal, by="sale")
    if not (isinstance(q_offset, int) and q_offset == 0):
        return ops.dot_product_attention(q, k, v, mask=masks.Causal(), q_offset=q_offset)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q {q.shape} must be of the tokens of k {k.shape}")
    sizes = dict(block_q=block_q, block_k=block_k, local=local)
    selected = select(q, k, threshold=threshold, **sizes)
    mask = masks.Blocks(selected, block_q, block_k) & masks.Causal()
    return ops.dot_product_attention(q, k, v, mask=mask)


def select(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    *,
    threshold: Threshold = 0.004,
    block_q: int = 64,
    block_k: int = 32,
    local: int = 128,
) -> Bool[Array, "B N tq tk"]:
    """The pairs of blocks that are computed. Has no gradient."""
    known = 0 if isinstance(threshold, jax.core.Tracer) else np.asarray(threshold)
    if not (np.all(known >= 0) and min(block_q, block_k) >= 1 and local >= 0):
        raise ValueError(
            f"{threshold=} and {local=} must be at least 0, {block_q=} and {block_k=} at least 1"
        )
    if np.size(threshold) not in (1, q.shape[2]):
        raise ValueError(
            f"{threshold=} must be one number, or one for each of {q.shape[2]} heads, and an array "
            "to be split with them"
        )
    q, k = (x.astype(jnp.float32) for x in lax.stop_gradient((q, k)))
    k = k - k.mean(1, keepdims=True)  # the same for all scores of a query: no weight changes
    always, reach = _always(q.shape[1], block_q, block_k, local)
    near = masks.Blocks(jnp.asarray(always), block_q, block_k) & masks.Causal()
    lse = ops.dot_product_attention(q, k, k[..., :1], mask=near, return_lse=True)[1]
    bar = lse + jnp.log(jnp.asarray(threshold, jnp.float32)).reshape(1, 1, -1)
    return (_any_above(q, k, bar, block_q, block_k) | always) & reach


def bits(
    x: Float[Array, "*B H"],
) -> tuple[Int[Array, "*B H"], Float[Array, "*B 1"]]:
    """Whole numbers from -7 to 7 and a scale with x ~ numbers * scale, for each token."""
    scale = jnp.abs(x).max(-1, keepdims=True) / _LARGEST
    return jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale


def _always(T, block_q, block_k, local):
    """Pairs of blocks that are first or local, and those that any query may see (1 1 tq tk)."""
    reach = blocks.reachable(T, T, block_q, block_k)
    rows, columns = (np.arange(n) for n in reach.shape)
    near = (columns[None] + 1) * block_k > rows[:, None] * block_q - local
    return (((columns == 0)[None] | near) & reach)[None, None], reach[None, None]


def _any_above(q, k, bar, block_q, block_k):
    """Whether a pair of blocks has an estimate above the bar (B T N) of its query."""
    (B, T, N, H), K = q.shape, k.shape[2]
    centre = q.mean(1, keepdims=True)
    known = jnp.einsum("BKGH,BSKH->BKGS", centre.reshape(B, K, -1, H), k)[:, :, :, None]
    (q, scale_q), (k, scale_k) = bits(q - centre), bits(k)
    scale_k = scale_k[..., 0].swapaxes(1, 2)[:, :, None, None]
    s = jnp.arange(T)

    def row(x):
        i, q, scale, bar = x  # (B C N ...)
        heads = lambda x: x.reshape(B, block_q, K, N // K, -1)
        x = jnp.einsum("BCKGH,BSKH->BKGCS", heads(q), k, preferred_element_type=jnp.int32)
        tall = lambda x: heads(x).transpose(0, 2, 3, 1, 4)
        x = (x * tall(scale) * scale_k + known) * H**-0.5
        past = s[None] <= i * block_q + jnp.arange(block_q)[:, None]
        hit = ((x > tall(bar)) & past[None, None, None]).any(3).reshape(B, N, T)
        return blocks.by_block(hit.swapaxes(1, 2), block_k).any(2)

    rows = [blocks.by_block(x, block_q).swapaxes(0, 1) for x in (q, scale_q)]
    rows.append(blocks.by_block(bar, block_q, fill=jnp.inf).swapaxes(0, 1))
    above = lax.map(row, (jnp.arange(len(rows[0])), *rows))  # (tq B tk N)
    return above.transpose(1, 3, 0, 2)


class Sale(attention.KeyValueAttention):
    """Causal attention over (B T D), sparse over a prompt and full where `extend` goes on."""

    threshold: float | tuple[float, ...] = 0.004
    block_q: int = 64
    block_k: int = 32
    local: int = 128
    fn: Callable[..., jax.Array] = sale

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself."""
        q, k, v = self._project(x, jnp.arange(x.shape[1]))
        several = isinstance(self.threshold, tuple)  # an array can be split with the heads
        threshold = jnp.asarray(self.threshold) if several else self.threshold
        options = dict(threshold=threshold, local=self.local)
        options |= dict(block_q=self.block_q, block_k=self.block_k)
        return self.out(self.attend(q, k, v, mask=mask, **options), x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k[:, :, :2], v=v[:, :, :2])


def _oracle(q, k, v, *, threshold=0.004, block_q=64, block_k=32, local=128):
    T, N, H = q.shape[1:]
    k, v = (jnp.repeat(x, N // k.shape[2], 2) for x in (k, v))
    t, s = np.arange(T)[None, None, :, None], np.arange(T)[None, None, None]
    score = lambda q, k: jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(H)

    def rounded(x):
        step = jnp.abs(x).max(-1, keepdims=True) / 7
        return jnp.round(x / jnp.maximum(step, 1e-30)) * step

    k = k - k.mean(1, keepdims=True)
    centre = jnp.broadcast_to(q.mean(1, keepdims=True), q.shape)
    row, column = np.arange(T) // block_q, np.arange(T) // block_k
    near = (s < block_k) | ((s // block_k + 1) * block_k > t // block_q * block_q - local)
    mass = jax.nn.logsumexp(jnp.where(near & (s <= t), score(q, k), -1e30), -1, keepdims=True)
    estimate = score(rounded(q - centre), rounded(k)) + score(centre, k)
    level = jnp.broadcast_to(jnp.asarray(threshold, float), (N,))[None, :, None, None]
    loud = (jnp.exp(estimate - mass) > level) & (s <= t)
    of = lambda number: (np.arange(number[-1] + 1)[:, None] == number).astype(float)
    pairs = jnp.einsum("QT,BNTS,LS->BNQL", of(row), loud.astype(float), of(column)) > 0
    x = jnp.where((near | pairs[:, :, row][..., column]) & (s <= t), score(q, k), -1e30)
    return jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(x), v)


SPEC = registry.Mechanism(
    fn=sale,
    module=Sale,
    small=dict(
        num_heads=4, head_dim=8, num_kv_heads=2, block_q=2, block_k=1, local=1, threshold=0.5
    ),
    papers=("sale",),
    example=_example,
    oracle=_oracle,
    variants=(
        {},
        dict(block_q=4, block_k=2, local=4, threshold=0.3),
        dict(block_q=8, block_k=4, local=0, threshold=(0.0, 0.2, 0.4, 9.0)),
    ),
    claims=frozenset({Claim.DENSE_TWIN, Claim.FORWARD_MODE, Claim.CONTEXT_PARALLEL}),
    context=("all_to_all",),
)
