"""How time and channels are cut into the steps of the TPU's kernels, and arrays laid out for it."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

GROUP = 16  # tokens: rows of the smallest tile that any 16- or 32-bit dtype needs
_LANES, _MOST = 128, 512  # channels: of a register, and the most of a step
_STATES, _VMEM = 2**21, 2**23  # bytes that the states of a chunk should take, and may, backward


def fits(M: int, chunk: int) -> bool:
    """Whether the backward pass can hold the states of a chunk, of M entries for each channel."""
    return _bytes(M, chunk) * _LANES <= _VMEM


def _bytes(M, chunk):
    """Of the states of a chunk for one channel, which fill up whole registers."""
    return 4 * chunk * -(-M // 8) * 8


class Cut(NamedTuple):
    """How time and channels are cut, and how arrays are laid out for it: heads before time."""

    C: int  # tokens of a chunk
    L: int  # channels of a part
    M: int
    chunks: int
    parts: int

    @classmethod
    def of(cls, H, M, T, chunk):
        C = min(chunk, -(-T // GROUP) * GROUP)
        most = min(max(_STATES // _bytes(M, C) // _LANES, 1) * _LANES, _MOST)
        parts = -(-H // most)
        L = H if parts == 1 else -(-H // parts // _LANES) * _LANES
        return cls(C, L, M, -(-T // C), parts)

    def inputs(self, tokens, weights, new):
        (x, delta, b, c), (rate, skip) = tokens, weights
        inputs = dict(x=self.channels(x), delta=self.channels(delta))
        inputs |= dict(b=self.time(b), c=self.time(c))
        inputs |= dict(rate=self.lanes(rate.mT), skip=self.lanes(skip[:, None]))
        if new is not None:
            keeps = 1 - self.time(new[..., None, None].astype(jnp.float32))
            inputs["keeps"] = keeps.reshape(len(new), self.chunks, 1, self.C)
        return inputs

    def time(self, x):
        """(B T N F) -> (B N T F), with T in whole chunks."""
        pad = self.chunks * self.C - x.shape[1]
        return jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2)

    def lanes(self, x):
        """(... H) with H in whole parts."""
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.parts * self.L - x.shape[-1])])

    def channels(self, x):
        """(B T N H) -> (B N T H), with both in whole steps."""
        return self.lanes(self.time(x))

    def state(self, x):
        """(B N H M) -> (B N M H)"""
        return self.lanes(x.mT)

    def of_parts(self, shape):
        """Of an array for each part of the channels."""
        return (*shape[:2], self.parts, *shape[2:])

    def blocks(self, reverse):
        """The block of each array by its name, that the grid's (b, n, j, i) is at."""
        C, L, M = self.C, self.L, self.M
        number = lambda i: self.chunks - 1 - i if reverse else i
        at = lambda block, index, **where: pl.BlockSpec(
            block, lambda b, n, j, i: index(b, n, j, number(i)), **where
        )
        channels = at((None, None, C, L), lambda b, n, j, i: (b, n, i, j))
        entries = at((None, None, C, M), lambda b, n, j, i: (b, n, i, 0))
        dentries = at((None, None, None, C, M), lambda b, n, j, i: (b, n, j, i, 0))
        state = at((None, None, M, L), lambda b, n, j, i: (b, n, 0, j))
        blocks = dict.fromkeys(("x", "delta", "y", "dx", "ddelta", "dy"), channels)
        blocks |= dict(b=entries, c=entries, db=dentries, dc=dentries)
        blocks |= dict.fromkeys(("before", "after", "dbefore", "dafter", "drate"), state)
        return blocks | dict(
            rate=at((None, M, L), lambda b, n, j, i: (n, 0, j)),
            skip=at((None, 1, L), lambda b, n, j, i: (n, 0, j)),
            dskip=at((None, None, 1, L), lambda b, n, j, i: (b, n, 0, j)),
            states=at((None, None, None, M, L), lambda b, n, j, i: (b, n, i, 0, j)),
            keeps=at((None, None, 1, C), lambda b, n, j, i: (b, i, 0, 0), memory_space=pltpu.SMEM),
        )


def join(x, like):
    """(B N T F) -> (B T N F), without what was filled up, in the dtype of `like`."""
    _, T, _, F = like.shape
    return x[:, :, :T, :F].swapaxes(1, 2).astype(like.dtype)
