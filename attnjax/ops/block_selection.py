"""Which blocks of keys a block of queries attends to.

A selection is a boolean array (B N tq tk), by head, block of queries and block of keys. As the
mask `masks.Blocks(selected, block_q, block_k)`, `ops.dot_product_attention` computes the chosen
blocks and skips the others, so its time is that of the chosen blocks.

Letters: tq and tk blocks of queries and of keys, C tokens of a block, L blocks.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def means(
    x: Float[Array, "B T N H"], block: int, seen: Bool[Array, "B T"] | None = None
) -> Float[Array, "B L N H"]:
    """Means of the tokens of each block in float32; of those that are `seen`, 0 where none is."""
    seen = jnp.ones(x.shape[:2], bool) if seen is None else seen
    x = jnp.where(seen[..., None, None], x.astype(jnp.float32), 0.0)
    count = jnp.maximum(by_block(seen, block).sum(2), 1)
    return by_block(x, block).sum(2) / count[..., None, None]


def by_block(x, block: int, fill=0):
    """(B T ...) -> (B L C ...), the last block filled up."""
    pad = [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad, constant_values=fill)
    return x.reshape(x.shape[0], -1, block, *x.shape[2:])


def reachable(T: int, S: int, block_q: int, block_k: int) -> Bool[np.ndarray, "tq tk"]:
    """Pairs of blocks of which a causal query sees any key; both begin at position 0."""
    last = np.minimum(np.arange(block_q, T + block_q, block_q), T) - 1
    return np.arange(0, S, block_k)[None] <= last[:, None]


def best(score: Float[Array, "*X L"], count: int) -> Bool[Array, "*X L"]:
    """The `count` highest scores; an earlier one goes first among equals, -inf never."""
    return (_rank(score) < count) & (score > -jnp.inf)


def smallest_set(weight: Float[Array, "*X L"], mass: float) -> Bool[Array, "*X L"]:
    """The fewest entries that together reach `mass` of the sum of the weights; at least one.

    Weights are not negative. Entries of weight 0 are never chosen.
    """
    rank = _rank(weight)
    falling = jnp.take_along_axis(weight, jnp.argsort(-weight, stable=True), -1)
    before = jnp.cumsum(falling, -1) - falling  # what the larger ones reach without this one
    needed = before < mass * falling.sum(-1, keepdims=True)
    needed = needed.at[..., 0].set(True)
    return jnp.take_along_axis(needed, rank, -1) & (weight > 0)


def _rank(x):
    """Place of each entry among those of the last axis, from the highest down."""
    return jnp.argsort(jnp.argsort(-x, stable=True), stable=True)
