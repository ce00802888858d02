r"""SpargeAttn: skips the blocks that means call unimportant, where a mean says much of its block.

Paper: Zhang et al., "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference",
arXiv:2502.18137, sections 3.2 to 3.4 and algorithm 1.

    sim(X)  = mean over pairs of the tokens of a block X of their cosine
    P_i     = softmax_j(mean(Q_i) . mean(K_j) / sqrt(H)),        over j with sim(K_j) > theta
    M_ij    = j is one of the fewest blocks of mass tau by P_i,
              or sim(Q_i) <= theta, or sim(K_j) <= theta
    o_t     = sum_j [max_{t in i}(m_tj - m_t,1..j) >= drop] W_tj V_j  /  sum_j sum W_tj,    M_ij
    m_tj    = max of the scores of block j,   m_t,1..j  the largest so far,   W_tj  exp of scores

First the pairs of blocks with M_ij = 0 are skipped. Then, in the online softmax, the product with
the values of a block is skipped where all its scores lie far below what was seen before. Of the
keys their mean is subtracted first, which changes no softmax but what similarity means. It needs
no training: set it as `fn` of a MultiHeadAttention, as `functools.partial(spargeattn, tau=0.9)`.

Shapes: B batch, T queries, S keys, N heads, K kv-heads, H head dim, V value dim, C queries or keys
of a block, tq tk blocks of queries and of keys.
Unlike the paper: products are not quantised, one setting serves all heads, and tokens of images
keep their order; tau=1 is every block; below `Causal` the blocks on the diagonal are always there,
so that no query is left without a key.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attnjax.core import masks, registry
from attnjax.ops import block_selection as blocks
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import unit_vectors

_LOW = -1e30  # finite: the difference of two of them is 0


def spargeattn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: masks.Mask | None = None,
    tau: float = 0.9,
    theta: float = 0.5,
    drop: float | None = None,
    block_q: int = 128,
    block_k: int = 64,
    q_offset: int | Int[Array, ""] = 0,
) -> Float[Array, "B T N V"]:
    """o in v's dtype. With tau=1 and drop=None it is attention.

    Args:
      mask: honours Causal; NotImplementedError for others.
      tau: share of the attention that the chosen blocks are to hold, by P.
      theta: similarity up to which a block's mean is not trusted, from -1 to 1.
      drop: difference of scores, below 0; None is no second filter.
      q_offset: other than the int 0, the queries follow a cache and attention is full.

    Raises ValueError for options out of range.
    """
    (causal,) = masks.select(mask, masks.Causal, by="spargeattn")
    if drop is not None and drop > 0:
        raise ValueError(f"{drop=} must be at most 0")
    if not (isinstance(q_offset, int) and q_offset == 0):
        return ops.dot_product_attention(q, k, v, mask=mask, q_offset=q_offset)
    sizes = dict(block_q=block_q, block_k=block_k)
    selected = select(q, k, causal=bool(causal), tau=tau, theta=theta, **sizes)
    if drop is not None:
        return _filtered(q, k, v, selected, bool(causal), drop, block_q, block_k)
    chosen = masks.Blocks(selected, block_q, block_k)
    return ops.dot_product_attention(q, k, v, mask=mask & chosen if causal else chosen)


def select(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    causal: bool,
    tau: float = 0.9,
    theta: float = 0.5,
    block_q: int = 128,
    block_k: int = 64,
) -> Bool[Array, "B N tq tk"]:
    """M, the blocks that are not skipped. Has no gradient."""
    if not (0 <= tau <= 1 and -1 <= theta <= 1 and block_q >= 1 and block_k >= 1):
        raise ValueError(
            f"{tau=} must be in [0, 1], {theta=} in [-1, 1], {block_q=} and {block_k=} at least 1"
        )
    q, k = (x.astype(jnp.float32) for x in lax.stop_gradient((q, k)))
    k = k - k.mean(1, keepdims=True)
    heads = lambda x: jnp.repeat(x, q.shape[2] // k.shape[2], 2)
    means = blocks.means(q, block_q), heads(blocks.means(k, block_k))
    score = jnp.einsum("BQNH,BLNH->BNQL", *means) * q.shape[-1] ** -0.5
    rows = (similarity(q, block_q) <= theta).swapaxes(1, 2)[..., None]
    columns = heads(similarity(k, block_k) <= theta).swapaxes(1, 2)[:, :, None]
    reach, diagonal = _reach(q.shape[1], k.shape[1], block_q, block_k, causal)
    usable = reach & ~columns
    share = jnp.where(usable, jax.nn.softmax(jnp.where(usable, score, _LOW)), 0)
    chosen = blocks.smallest_set(share, tau) | rows | columns | diagonal
    return (chosen | (tau == 1)) & reach


def similarity(x: Float[Array, "B T N H"], block: int) -> Float[Array, "B L N"]:
    """Mean cosine of the pairs of tokens of each block: |mean of unit vectors|^2."""
    return (blocks.means(unit_vectors.unit(x), block) ** 2).sum(-1)


def _reach(T, S, block_q, block_k, causal):
    """Pairs of blocks that any query may see, and those on the diagonal (1 1 tq tk)."""
    count = -(-T // block_q), -(-S // block_k)
    if not causal:
        return np.ones((1, 1, *count), bool), np.zeros((1, 1, *count), bool)
    reach = blocks.reachable(T, S, block_q, block_k)
    later = np.arange(1, count[1] + 1)[None] * block_k > np.arange(count[0])[:, None] * block_q
    return reach[None, None], (reach & later)[None, None]


def _filtered(q, k, v, selected, causal, drop, block_q, block_k):
    """Attention to the selected blocks in order, each query block by itself, with `drop`."""
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    q, k, v = (blocks.by_block(x, size) for x, size in ((q, block_q), (k, block_k), (v, block_k)))

    def row(unit):
        b, n, i = unit
        rows = q[b, i, :, n].astype(jnp.float32) * q.shape[-1] ** -0.5
        t = i * block_q + jnp.arange(block_q)[:, None]

        def step(carry, j):
            s = j * block_k + jnp.arange(block_k)[None, :]
            seen = (t < T) & (s < S) & ((s <= t) | (not causal))
            keys, values = (x[b, j, :, n * K // N].astype(jnp.float32) for x in (k, v))
            tile = lambda carry: _attend(carry, rows, keys, values, seen, drop)
            return lax.cond(selected[b, n, i, j], tile, lambda carry: carry, carry), None

        empty = jnp.zeros((block_q, v.shape[-1])), jnp.full(block_q, _LOW), jnp.zeros(block_q)
        (o, _, total), _ = lax.scan(step, empty, jnp.arange(k.shape[1]))
        return o / jnp.where(total > 0, total, 1)[:, None]

    tq = q.shape[1]
    units = [x.reshape(-1) for x in jnp.indices((B, N, tq))]
    o = lax.map(jax.checkpoint(row), units).reshape(B, N, tq * block_q, -1)
    return o.swapaxes(1, 2)[:, :T].astype(v.dtype)


def _attend(carry, q, k, v, seen, drop):
    """Add a block of keys to (o, peak, total) of the online softmax."""
    o, peak, total = carry
    x = jnp.where(seen, q @ k.T, _LOW)
    local = lax.stop_gradient(x).max(-1)
    higher = jnp.maximum(peak, local)
    weights = jnp.where(seen, jnp.exp(x - higher[:, None]), 0)
    near = seen.any(-1) & (local - higher >= drop)
    add = lambda: weights @ v
    decay = jnp.exp(peak - higher)
    o = o * decay[:, None] + lax.cond(near.any(), add, lambda: jnp.zeros_like(o))
    return o, higher, total * decay + weights.sum(-1)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k[:, :, :2], v=v[:, :, :2])


def _oracle(q, k, v, *, mask=None, tau=0.9, theta=0.5, drop=None, block_q=128, block_k=64):
    """One head at a time with whole matrices; a block of keys is a column of (T, blocks)."""
    T, H, S = q.shape[1], q.shape[3], k.shape[1]
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], 2) for x in (k, v))
    of = lambda n, size: jnp.array(np.arange(-(-n // size))[:, None] == np.arange(n) // size, float)
    queries, keys, seen = of(T, block_q), of(S, block_k), masks.dense(mask, T, S)[0, 0]
    mean = lambda x, of: of @ x / of.sum(1, keepdims=True)
    expand = lambda pairs: queries.T @ pairs @ keys > 0

    def trusted(x, of):
        unit = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        return jnp.diag(of @ (unit @ unit.T) @ of.T) / of.sum(1) ** 2 > theta

    def head(q, k, v):
        k = k - k.mean(0, keepdims=True)
        trust_q, trust_k = trusted(q, queries), trusted(k, keys)
        p = jnp.exp(mean(q, queries) @ mean(k, keys).T / jnp.sqrt(H))
        p = p * (queries @ seen @ keys.T > 0) * trust_k[None]
        larger = jnp.where(p[:, None, :] > p[:, :, None], p[:, None, :], 0).sum(-1)
        chosen = (larger < tau * p.sum(-1, keepdims=True)) & (p > 0)
        chosen = chosen | ~trust_q[:, None] | ~trust_k[None] | (tau == 1)
        if mask is not None:
            first = jnp.arange(len(queries)) * block_q
            chosen = chosen | (jnp.arange(1, len(keys) + 1)[None] * block_k > first[:, None])
        x = jnp.where(expand(chosen) & seen, q @ k.T / jnp.sqrt(H), -jnp.inf)
        local = jnp.where(keys[None] > 0, x[:, None], -jnp.inf).max(-1)
        below = local - jax.lax.cummax(local, axis=1)  # NaN before the first key
        kept = queries @ (below >= (-jnp.inf if drop is None else drop))
        w = jax.nn.softmax(jnp.maximum(x, -1e30)) * expand(kept)
        return (w @ v).astype(v.dtype)

    return jax.vmap(jax.vmap(head, 1, 1))(q, k, v)


SPEC = registry.Intervention(
    fn=spargeattn,
    papers=("spargeattn",),
    example=_example,
    oracle=_oracle,
    identity=dict(tau=1.0, mask=masks.Causal()),
    untouched=lambda q, k, v: ops.dot_product_attention(q, k, v, mask=masks.Causal()),
    variants=(
        dict(block_q=8, block_k=8, theta=0.0, tau=0.5),
        dict(block_q=8, block_k=4, theta=0.3, tau=0.4, mask=masks.Causal(), drop=-1.0),
        dict(block_q=4, block_k=2, theta=-1.0, tau=0.4, mask=masks.Causal()),
    ),
)
