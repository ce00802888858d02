"""Dropout of attention weights, decided by position.

Whether the weight of (batch, head, query, key) is kept is a hash of those four numbers and the
key. So it is the same for every tiling, for a recomputation in a backward pass, and on every
device that holds a piece of the sequence.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, UInt32


@functools.partial(jax.tree_util.register_dataclass, data_fields=["key"], meta_fields=["rate"])
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Drop each weight with probability `rate` and divide the others by 1 - rate."""

    rate: float
    key: Key[Array, ""]

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate={self.rate} must be in [0, 1)")

    def keep(
        self, b: Int[Array, "*#S"], n: Int[Array, "*#S"], t: Int[Array, "*#S"], s: Int[Array, "*#S"]
    ) -> Bool[Array, "*S"]:
        """Whether the weight of batch b, head n, query position t, key position s is kept."""
        return kept(self.rate, self.seed, b, n, t, s)

    @property
    def seed(self) -> UInt32[Array, "2"]:
        """What is hashed with the positions."""
        return jax.random.bits(self.key, (2,), jnp.uint32)


def kept(rate: float, seed, b, n, t, s) -> Bool[Array, "..."]:
    """`Dropout.keep` for a rate and two numbers as seed: no more than arithmetic, for a kernel."""
    h = seed[0]
    for index in (b, n, t, s):
        h = _mix(h + index.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + seed[1])
    return h >= jnp.uint32(round(rate * (2**32 - 1)))


def _mix(x):
    """An invertible mixing of 32 bits by multiplications and shifts (Wellons, "lowbias32")."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)
