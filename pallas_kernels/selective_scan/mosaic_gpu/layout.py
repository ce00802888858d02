"""How the kernels for Hopper cut time, channels and entries, and what arrays are filled up to."""

from typing import NamedTuple

import jax.numpy as jnp

STEP = 16  # tokens that are fetched at once: what every chunk is a multiple of
CHANNELS = 64  # rows of the smallest matrix that a warpgroup's registers are laid out for
GROUP = 4  # tokens that are unrolled, so that one's loads run under another's arithmetic


class Cut(NamedTuple):
    """What arrays are filled up to, with what changes nothing."""

    T: int
    H: int
    M: int
    E: int  # entries of a part, of the M of a state

    @classmethod
    def of(cls, T: int, H: int, M: int, *, whole: int) -> "Cut":
        """For T in whole steps of so many."""
        M = _up(M, 8 if M <= 16 else 16)
        return cls(_up(T, whole), _up(H, CHANNELS), M, M)

    def most(self, entries: int) -> "Cut":
        """With parts of so many entries at most."""
        return self._replace(E=max(x for x in range(8, entries + 1, 8) if self.M % x == 0))

    @property
    def parts(self):
        return self.M // self.E

    def tokens(self, x):
        """(B T ...) -> in whole steps."""
        return fill(x, 1, self.T)

    def channels(self, x):
        """(B T N H)"""
        return fill(self.tokens(x), 3, self.H)

    def entries(self, x):
        """(B T N M), in float32: they are few, and each is read by all channels."""
        return fill(self.tokens(x.astype(jnp.float32)), 3, self.M)

    def state(self, x):
        """(... H M)"""
        return fill(fill(x.astype(jnp.float32), x.ndim - 2, self.H), x.ndim - 1, self.M)


def _up(size, unit):
    return -(-size // unit) * unit


def fill(x, axis: int, size: int, value=0):
    """x with an axis filled up to `size`."""
    widths = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)
