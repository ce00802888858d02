"""How groups are packed for the TPU's kernels: queries of several side by side in 128 lanes.

Scores lie with keys in sublanes and queries in lanes. Those of 49 queries alone would leave most of
a register's 128 lanes empty, so groups of up to 64 queries share them: each group's keys meet the
queries of all groups of a pack, which costs the matrix unit nothing, as its columns are there
anyway, and of each group's rows the lanes of its own queries are taken.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

VMEM = 12 * 2**20  # bytes that a kernel may take of 16 MiB
_STEP = 4 * 2**20  # bytes that the blocks of a step should take
_LANES, _MOST = 128, 8  # of a register; groups of a pack


class Cut(NamedTuple):
    """The sizes of everything."""

    T: int
    S: int
    heads: int  # of queries, in a step
    kv_heads: int
    pack: int  # groups of a pack
    packs: int  # of a step
    steps: int
    parts: int  # of the heads
    vmem: int  # bytes that the backward kernel takes, about

    @classmethod
    def of(
        cls,
        q: jax.Array | jax.ShapeDtypeStruct,
        k: jax.Array | jax.ShapeDtypeStruct,
        v: jax.Array | jax.ShapeDtypeStruct,
        *,
        biased: bool,
        pack: int | None = None,
        packs: int | None = None,
    ) -> "Cut":
        """As large as lanes and memory allow, with `pack` and `packs` at most where given."""
        (_, G, T, N, H), (_, _, S, K, V) = q.shape, v.shape
        heads = _heads(N, K, H, V)
        pack = max(1, min(_LANES // T, pack or _MOST, G))
        kv_heads = heads * K // N
        size = max(x.dtype.itemsize for x in (q, k, v))
        rows = lambda count, heads: _up(count, 16) * _up(heads * max(H, V), _LANES) * size
        one = 2 * (3 * rows(pack * T, heads) + 4 * pack * rows(S, kv_heads))  # each is there twice
        tile = 4 * _up(S, 8) * _up(pack * T, _LANES)
        fixed = 8 * tile + 4 * biased * heads * tile
        room = min(packs, (VMEM - fixed) // one) if packs else (_STEP - fixed) // one
        packs = max(1, min(room, -(-G // pack)))
        steps = -(-G // (pack * packs))
        packs = -(-G // (pack * steps))
        sizes = heads, kv_heads, pack, packs, steps, N // heads
        return cls(T, S, *sizes, fixed + packs * one)

    def queries(self, x):
        """(B G T N F) -> (B, steps, packs, lanes, N F)"""
        B, _, _, N, F = x.shape
        x = self._groups(x, 1)
        return x.reshape(B, self.steps, self.packs, self.pack * self.T, N * F)

    def keys(self, x):
        """(B G S K F) -> (B, steps, packs, pack, S, K F)"""
        B, _, S, K, F = x.shape
        return self._groups(x, 1).reshape(B, self.steps, self.packs, self.pack, S, K * F)

    def apart(self, x, like):
        """The inverse of `queries` and `keys`, in the shape and dtype of `like`."""
        B, G, *rest = like.shape
        return x.reshape(B, -1, *rest)[:, :G].astype(like.dtype)

    def near(self, near):
        """{name: array}: `at` (steps, packs, pack, A, S), or ones, and `ends` in rows of lanes."""
        A, G, S = near.at.shape
        lead = (self.steps, self.packs, self.pack) if G > 1 else (1, 1, 1)
        at = (self._groups(near.at, 1) if G > 1 else near.at).swapaxes(0, 1)
        ends = [self._groups(x, 1, fill=fill) for x, fill in ((near.low, 0), (near.high, -1))]
        ends = jnp.concatenate(ends).reshape(2 * A, self.steps, self.packs, -1)
        return dict(at=at.reshape(*lead, A, S), ends=jnp.moveaxis(ends, 0, 2))

    def bias(self, bias):
        """(N T S) -> (N, S, lanes), again for each group of a pack."""
        return jnp.tile(bias.mT, (1, 1, self.pack))

    def _groups(self, x, axis, fill=0):
        """The axis of groups filled up to whole steps."""
        pads = [(0, 0)] * x.ndim
        pads[axis] = (0, self.steps * self.packs * self.pack - x.shape[axis])
        return jnp.pad(x, pads, constant_values=fill)

    def block(self, name, x):
        """The block of an array that the grid's (part of the heads, b, step) is at."""
        zeros = lambda count: (0,) * count
        if name in ("bias", "dbias"):
            return pl.BlockSpec((self.heads, *x.shape[1:]), lambda h, b, i: (h, 0, 0))
        if name in ("at", "ends"):
            step = (lambda i: i) if x.shape[0] > 1 else (lambda i: 0)
            index = lambda h, b, i: (step(i), *zeros(x.ndim - 1))
            return pl.BlockSpec((None, *x.shape[1:]), index)
        shape = (None, None, *x.shape[2:-1], x.shape[-1] // self.parts)
        return pl.BlockSpec(shape, lambda h, b, i: (b, i, *zeros(x.ndim - 3), h))


def _heads(N, K, H, V):
    """How many to take at once: as few as fill whole registers, or all."""
    G = N // K
    for kv in range(1, K + 1):
        widths = kv * H, kv * V, kv * G * H, kv * G * V
        if K % kv == 0 and all(width % _LANES == 0 for width in widths):
            return kv * G
    return N


def _up(count, multiple):
    return math.ceil(count / multiple) * multiple
