"""Masks of training on long sequences, by name and for any length.

full            every key
causal          the keys up to a query's own
sliding         of these, the last eighth of the sequence
document        eight documents, the last fifteen times as long as the first, causal within each
shared-prefix   the same, and every document sees the first sixteenth of the sequence
block           of 64 x 64 blocks those on the diagonal and an eighth of the others, at random
"""

import jax.numpy as jnp
import numpy as np

from attnjax.core import masks

_DOCUMENTS, _BLOCKS = 8, 64


def by_name(length: int) -> dict[str, masks.Mask | None]:
    """The masks over a sequence, with arrays of the shape (1 ...) in them."""
    causal, documents = masks.Causal(), masks.Segments(_documents(length))
    return {
        "full": None,
        "causal": causal,
        "sliding": masks.Window(max(length // 8 - 1, 0)),
        "document": documents & causal,
        "shared-prefix": (documents | masks.Prefix(length // 16)) & causal,
        "block": _blocks(length),
    }


def _documents(length):
    """The number of each token's document (1 T): document i ends at (i + 1)^2 / 64 of all."""
    ends = length * np.arange(1, _DOCUMENTS) ** 2 / _DOCUMENTS**2
    return jnp.asarray(np.searchsorted(ends, np.arange(length), "right")[None], jnp.int32)


def _blocks(length):
    count = min(_BLOCKS, length)
    chosen = np.random.default_rng(0).random((1, 1, count, count)) < 1 / 8
    size = -(-length // count)
    return masks.Blocks(chosen | np.eye(count, dtype=bool), size, size)
