"""Attention of many small groups on Hopper GPUs: packs of groups as batch entries of few tiles.

Groups of less than a tile of queries share one, side by side, with their keys one group after the
other: what a group's queries don't see of the others' keys is masked, and as a tile's time is that
of its keys, a group takes that of its own. Groups of more queries have several tiles, and those
that no interval reaches are skipped. The kernels are those of flash attention.
"""

import functools
import itertools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import flash_attention, neighborhood
from pallas_kernels.flash_attention import mosaic_gpu
from pallas_kernels.flash_attention.mosaic_gpu import TILE

_MOST_PACKS = 2**16 - 1  # of a grid's last axis


def neighborhood_attention(
    q: Float[Array, "B G T N H"],
    k: Float[Array, "B G S K H"],
    v: Float[Array, "B G S K V"],
    *,
    scale: float,
    near: neighborhood.Near | None = None,
    bias: Float[Array, "N T S"] | None = None,
    interpret=False,
) -> Float[Array, "B G T N V"]:
    """The output in v's dtype; arguments and gradients as of `neighborhood_attention` for TPU.

    Args:
      interpret: `plgpu.InterpretGPUParams()` runs on a CPU, slowly.

    A pack has as many groups as waste least, or as the table of the device says with `pack` at
    most. Keys of a step are those of softmax attention, by its rows.

    Raises NotImplementedError for too many packs, and for what `flash_attention.mosaic_gpu` can't
    honour, and ValueError for a row with other tiles than `pack`.
    """
    asked = neighborhood.tiles(q, v, "pack", kernel_for="cuda")
    cut = Cut.of(*q.shape[:3], k.shape[2], **asked)
    if (packs := q.shape[0] * cut.packs) > _MOST_PACKS:
        raise NotImplementedError(
            f"the kernel for Hopper takes {_MOST_PACKS} packs of groups, not {packs}"
        )
    # varying over the axes of a mesh that q varies over, as all arrays of a kernel must
    whole = lambda x: x + jnp.zeros_like(q, x.dtype, x.shape)
    t, s = (whole(jnp.arange(cut.pack * n) // n) for n in (cut.T, cut.S))  # numbers of groups
    near, bias = jax.tree.map(whole, (near, bias))
    visible, arrays = _visible(cut, near)
    mask = flash_attention.Mask(_states(cut, near), visible, arrays)
    q, k, v = map(cut.tokens, (q, k, v))
    if bias is not None:
        bias = jnp.tile(bias, (1, cut.pack, cut.pack))[None]
    options = dict(scale=scale, bias=bias, interpret=interpret)
    o, _ = mosaic_gpu.flash_attention(q, k, v, t, s, mask, **options)
    return cut.groups(o)


class Cut(NamedTuple):
    """The sizes of everything."""

    B: int
    G: int
    T: int
    S: int
    pack: int  # groups of a pack

    @classmethod
    def of(cls, B: int, G: int, T: int, S: int, pack: int | None = None) -> "Cut":
        """Packs of so many groups at most, or that waste least.

        What counts is a group's share of the pack's tiles of keys.
        """
        most = max(1, min(TILE // T, G))
        share = lambda pack: (-(-pack * S // TILE) / pack, -pack)
        return cls(B, G, T, S, min(pack or min(range(1, most + 1), key=share), most))

    @property
    def packs(self) -> int:
        """Of each sequence."""
        return -(-self.G // self.pack)

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles of queries and of keys, of a pack."""
        return -(-self.pack * self.T // TILE), -(-self.pack * self.S // TILE)

    def tokens(self, x: jax.Array) -> jax.Array:
        """(B G L ...) -> (B packs, pack L, ...), filled up to whole packs."""
        pads = [(0, -self.G % self.pack if i == 1 else 0) for i in range(x.ndim)]
        return jnp.pad(x, pads).reshape(self.B * self.packs, -1, *x.shape[3:])

    def groups(self, x: jax.Array) -> jax.Array:
        """The inverse of `tokens`, for queries."""
        return x.reshape(self.B, -1, self.T, *x.shape[2:])[:, : self.G]

    def numbers(self, x: jax.Array) -> jax.Array:
        """(#G L), of each sequence, -> (B packs, pack L), or (1, pack L)."""
        if len(x) < self.G:
            return jnp.tile(x, (1, self.pack))
        return self.tokens(jnp.broadcast_to(x[None], (self.B, *x.shape)))


def _visible(cut, near):
    """(visible, arrays), as `flash_attention.Mask` has them, of numbers of groups as positions."""
    if near is None and cut.pack == 1:
        return None, ()
    ends = [] if near is None else zip(near.low, near.high, near.at, strict=True)
    axes = [[cut.numbers(x)[:, None] for x in axis] for axis in ends]
    arrays = [(low[..., None], high[..., None], at[:, :, None]) for low, high, at in axes]

    def visible(t, s, *arrays):
        seen = [t == s] if cut.pack > 1 else []
        for low, high, at in itertools.batched(arrays, 3):
            seen += [low <= at, at <= high]
        return functools.reduce(operator.and_, seen)

    return visible, tuple(itertools.chain.from_iterable(arrays))


def _states(cut, near):
    """States of the tiles of a pack; those of several tiles of queries are looked up in `near`."""
    rows, columns = cut.tiles
    if near is None and cut.pack == 1:
        states = np.full((1, 1, rows, columns), flash_attention.FULL)
        states[..., cut.S // TILE :] = flash_attention.PARTIAL  # keys that only fill up the last
        return states
    if near is None or rows == 1:
        return np.full((1, 1, rows, columns), flash_attention.PARTIAL)
    low, high, at = (_tiles(x) for x in (near.low, near.high, near.at))
    reached = (low.min(-1)[..., None] <= at.max(-1)[:, :, None]) & (
        at.min(-1)[:, :, None] <= high.max(-1)[..., None]
    )
    states = jnp.where(reached.all(0), flash_attention.PARTIAL, flash_attention.EMPTY)
    return jnp.tile(states[:, None], (cut.B, 1, 1, 1))


def _tiles(x):
    """(A G L) -> (A G tiles TILE), the last one filled up by what it ends with."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % TILE)), mode="edge")
    return x.reshape(*x.shape[:2], -1, TILE)
