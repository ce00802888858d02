"""The blocks of keys that each query and head likes best, chosen among those before its own.

    s_tl = q_t . key_l            key_l: what stands for block l, as its mean or its landmark

For `ops.selected_block_attention`. Letters: A blocks chosen by a query, L blocks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_CHUNK = 128  # queries taken at a time: the scores of all are T L numbers


def best_blocks(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B L K H"],
    usable: Bool[Array, "B L"],
    at: Int[Array, "T"],
    *,
    count: int,
    own: bool,
) -> Int[Array, "B T N A"]:
    """The A = min(count, L) blocks of highest s for queries that lie in the blocks `at`.

    Args:
      usable: blocks that may be chosen.
      own: whether the block of the query itself is always the first of the A; else it is none.

    What a query lacks in usable earlier blocks is filled up by others. Has no gradient, and takes
    memory linear in T and L.
    """
    (B, T, N, H), (L, K) = q.shape, keys.shape[1:3]
    q, keys = jax.lax.stop_gradient((q, keys.astype(jnp.float32)))

    def of_query(x):
        q, at = x
        q = q.reshape(B, K, N // K, H).astype(jnp.float32)
        score = jnp.einsum("BKGH,BLKH->BKGL", q, keys)
        past = usable[:, None, None] & (jnp.arange(L) < at)[None, None, None]
        score = jnp.where(past, score, -jnp.inf)
        score = score.at[..., at].set(jnp.inf if own else -jnp.inf)
        return jax.lax.top_k(score, min(count, L))[1].reshape(B, N, -1)

    by_query = q.swapaxes(0, 1), at
    return jax.lax.map(of_query, by_query, batch_size=min(T, _CHUNK)).swapaxes(0, 1)
