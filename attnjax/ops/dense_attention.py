"""Softmax attention with its whole matrix in memory: the reference for every other form."""

import jax
import jax.numpy as jnp


def dense_attention(
    q, k, v, t, s, *, mask, bias, scale, softcap, sinks, dropout, score_mod, whole=None
):
    """(output, lse) as `ops.dot_product_attention` defines them; O(T S) memory.

    t (T) and s (S) are the positions of queries and keys. `whole`: see `ops.part_of_attention`.
    """
    B, T, N, _ = q.shape
    b, n = jnp.arange(B), jnp.arange(N)

    def weigh(weights):
        """Values by weights (B N T S) of which some are dropped: B N T V."""
        if dropout is not None:
            kept = dropout.keep(*jnp.ix_(b, n, t, s))
            weights = jnp.where(kept, weights / (1 - dropout.rate), 0.0)
        weights = weights.reshape(B, k.shape[2], -1, len(s))
        return (weights @ v.astype(jnp.float32).swapaxes(1, 2)).reshape(B, N, T, -1)

    x = logits(q, k, scale=scale, softcap=softcap)
    if bias is not None:
        x = x + bias.astype(jnp.float32)
    if score_mod is not None:
        x = over_tile(score_mod)(x, b, n, t, s)
    if mask is not None:
        x = jnp.where(mask.visible(t, s), x, -jnp.inf)
    if whole is not None:
        return _by_part(x, weigh, whole)
    peak = jnp.max(x, -1)  # B N T
    if sinks is not None:
        sinks = sinks.astype(jnp.float32)[None, :, None]
        peak = jnp.maximum(peak, sinks)
    # a query that sees nothing: no weights, and no NaN in the gradient
    peak = jax.lax.stop_gradient(jnp.where(peak > -jnp.inf, peak, 0.0))
    weights = jnp.exp(x - peak[..., None])
    total = weights.sum(-1)
    if sinks is not None:
        total = total + jnp.exp(sinks - peak)
    o = weigh(weights)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    o = o / total[..., None]  # here and not in the weights, which are many more
    lse = jnp.where(seen, peak + jnp.log(total), -jnp.inf)
    return o.swapaxes(1, 2).astype(v.dtype), lse.swapaxes(1, 2)


def _by_part(x, weigh, whole):
    """`whole`, whose derivative is that of its part with the scores x (B N T S)."""
    o, lse = jax.lax.stop_gradient(whole)
    weights = jnp.exp(x - jnp.where(lse == -jnp.inf, jnp.inf, lse).swapaxes(1, 2)[..., None])
    mass = weights.sum(-1).swapaxes(1, 2)
    moved = weigh(weights).swapaxes(1, 2) - mass[..., None] * o, mass
    # nothing, but for its derivative
    return jax.tree.map(
        lambda y, m: y + (m - jax.lax.stop_gradient(m)).astype(y.dtype), (o, lse), moved
    )


def logits(q, k, *, scale, softcap):
    """Scaled and soft-capped products in float32: (B N T S)."""
    B, T, N, H = q.shape
    q = q.swapaxes(1, 2).reshape(B, k.shape[2], -1, H)  # not the scores, which are more
    k = k.transpose(0, 2, 3, 1)
    x = jnp.matmul(q, k, preferred_element_type=jnp.float32).reshape(B, N, T, -1) * scale
    if softcap is not None:
        x = softcap * jnp.tanh(x / softcap)
    return x


def over_tile(score_mod):
    """`score_mod` of scalars, over scores (B N T S) and the indices b, n, t, s of their axes."""
    for axes in ((0, None, None, None, 0), (0, None, None, 0, None), (0, None, 0, None, None),
                 (0, 0, None, None, None)):  # fmt: skip
        score_mod = jax.vmap(score_mod, axes)
    return score_mod
