"""Which tiles of a score matrix must be computed, in which order, and how arrays are cut for it."""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.core import masks

_TILE = 512  # queries and keys of a tile: of 128 to 1024 the fastest on two CPU threads
_ENTRIES = 2**21  # scores held at once: heads that share a schedule are computed together
_OVERHEAD = 2**14  # what a tile costs beside its entries, in entries
_ALIGN = 16  # sizes are multiples of it, to fill vector registers
_STRIPS = 2  # of a partial tile's queries: 2 are as fast as 4 or 8, and 5 % faster than 1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["order", "full", "some"],
    meta_fields=["block_q", "block_k", "heads", "kinds", "strips"],
)
@dataclasses.dataclass(frozen=True)
class Schedule:
    """For each (batch, chunk of heads, query tile): key tiles in the order of their computation.

    The first `full` of `order` need no mask, those up to `some` need one, the rest are empty.
    heads is (C, P, G): chunks, key heads of a chunk, query heads of a key head. kinds are those
    that can occur at all, of masks.FULL and masks.PARTIAL. strips are (queries, keys) of a partial
    tile: what lies outside of them is visible in no such tile.
    """

    order: jax.Array | np.ndarray  # (B|1 C|1 tq tk)
    full: jax.Array | np.ndarray  # (B|1 C|1 tq)
    some: jax.Array | np.ndarray
    block_q: int
    block_k: int
    heads: tuple[int, int, int]
    kinds: tuple[int, ...]
    strips: tuple[tuple[slice, slice], ...]

    def rows(self, unit):
        """(order, full, some) by query tile, of one chunk of heads of one batch entry."""
        b, c = unit // self.heads[0], unit % self.heads[0]
        lists = (jnp.asarray(x) for x in (self.order, self.full, self.some))
        return tuple(x[b if x.shape[0] > 1 else 0, c if x.shape[1] > 1 else 0] for x in lists)

    def of_chunk(self, x, unit):
        """The part (P G) of an array by heads."""
        return jnp.asarray(x).reshape(self.heads)[unit % self.heads[0]]

    def over_keys(self, order, step, carry):
        """`step(key tile, carry, partial)` over the tiles of a row of `rows`."""
        tiles, full, some = order
        for kind in self.kinds:
            first, end = (0, full) if kind == masks.FULL else (full, some)
            body = lambda x, carry, partial=kind == masks.PARTIAL: step(tiles[x], carry, partial)
            carry = lax.fori_loop(first, end, body, carry)
        return carry

    def cut(self, q_scale, q, k, v, bias):
        """Queries, keys, values in tiles (see `_cut`; keys without G), and bias padded to tiles."""
        if bias is not None:
            for axis, block in ((2, self.block_q), (3, self.block_k)):
                bias = _pad(bias, axis, block) if bias.shape[axis] > 1 else bias
        k, v = (self._cut(x, self.block_k)[:, :, :, 0] for x in (k, v))
        return self.cut_rows(q * q_scale), k, v, bias

    def cut_rows(self, x, fill=None):
        """Queries, or what has their axes (B T N A), in tiles (B C, tq, P, G, block, A)."""
        return self._cut(x, self.block_q, fill)

    def _cut(self, x, block, fill=None):
        """(B L N A) -> (B C, tiles, P, G or 1 for keys, block, A), the last tile padded."""
        (C, P, _), (B, _, N, A) = self.heads, x.shape
        x = _pad(x, 1, block, fill).reshape(B, -1, block, C, P, N // (C * P), A)
        x = x.transpose(0, 3, 1, 4, 5, 2, 6)
        return x.reshape(B * C, *x.shape[2:])

    def join(self, x, length):
        """The inverse of `cut_rows`."""
        (C, P, G), (_, count, _, _, block, A) = self.heads, x.shape
        x = x.reshape(-1, C, count, P, G, block, A).transpose(0, 2, 5, 1, 3, 4, 6)
        return x.reshape(-1, count * block, C * P * G, A)[:, :length]


def _pad(x, axis, block, fill=None):
    """x with `axis` filled up to a multiple of `block`, by `fill` or else by its last entry."""
    widths = [(0, -n % block if i == axis else 0) for i, n in enumerate(x.shape)]
    if widths[axis] == (0, 0):
        return x
    return jnp.pad(x, widths, "edge") if fill is None else jnp.pad(x, widths, constant_values=fill)


def schedule(mask: masks.Mask | None, t, s, *, K: int, G: int, tile: int | None = None) -> Schedule:
    """The schedule for K key heads with G query heads each.

    Tiles have `tile` queries and keys, _TILE where None; for a mask that is known while tracing
    also a half or a quarter of that, if it costs less.
    """
    known = all(isinstance(x, np.ndarray) for x in (t, s, *jax.tree.leaves(mask)))
    sizes = _sizes(mask, len(t), len(s), tile or _TILE)
    choices = [_Tiling.of(mask, t, s, G, *size) for size in (sizes if known else sizes[:1])]
    tiling = min(choices, key=_Tiling.cost) if known else choices[0]
    states, block_q, block_k = tiling.states, tiling.block_q, tiling.block_k
    alike = K if states.shape[1] == 1 else 1  # key heads with one schedule
    most = min(alike, max(1, _ENTRIES // (G * block_q * block_k)))
    P = next(p for p in range(most, 0, -1) if K % p == 0)
    return Schedule(
        order=(np if known else jnp).argsort(-states, axis=-1, stable=True).astype(np.int32),
        full=(states == masks.FULL).sum(-1, dtype=np.int32),
        some=(states != masks.EMPTY).sum(-1, dtype=np.int32),
        block_q=block_q,
        block_k=block_k,
        heads=(K // P, P, G),
        kinds=tuple(x for x in (masks.FULL, masks.PARTIAL) if not known or (states == x).any()),
        strips=tiling.strips,
    )


def _sizes(mask, T, S, tile):
    """Tile sizes (queries, keys) to choose from, the largest first."""
    if blocks := list(_blocks(mask)):
        q, k = (math.gcd(tile, *sizes) for sizes in zip(*blocks, strict=True))
        return [
            (q if _ALIGN <= q <= T else _even(T, tile), k if _ALIGN <= k <= S else _even(S, tile))
        ]
    return [(_even(T, size), _even(S, size)) for size in (tile, tile // 2, tile // 4)]


def _blocks(mask):
    """Sizes of all block selections in a mask: their tiles must lie within the blocks."""
    if isinstance(mask, masks.Blocks):
        yield mask.block_q, mask.block_k
    for part in getattr(mask, "parts", ()):
        yield from _blocks(part)


def _even(length, most):
    """A tile size near `most` that leaves little of the last tile over."""
    count = -(-length // most)
    return length if count <= 1 else -(-length // (count * _ALIGN)) * _ALIGN


class _Tiling(NamedTuple):
    """A way to cut the score matrix into tiles, and what each of them is."""

    states: jax.Array | np.ndarray  # (#B, 1 or K, tq, tk) EMPTY, PARTIAL or FULL
    strips: tuple[tuple[slice, slice], ...]
    block_q: int
    block_k: int

    @classmethod
    def of(cls, mask, t, s, G, block_q, block_k):
        """The tiling of positions t and s for G query heads of a key head."""
        rows, columns = masks.tile_positions(t, block_q), masks.tile_positions(s, block_k)
        states = _states(mask, rows, columns, G)
        module = np if isinstance(states, np.ndarray) else jnp
        if len(s) % block_k:  # the last column has keys that don't exist
            most = np.where(np.arange(len(columns)) < len(columns) - 1, masks.FULL, masks.PARTIAL)
            states = module.minimum(states, most[None, None, None])
        strips = ((slice(0, block_q), slice(0, block_k)),)
        if module is np and not (block_q % (_STRIPS * _ALIGN) or block_k % (_STRIPS * _ALIGN)):
            height, width = block_q // _STRIPS, block_k // _STRIPS
            parts = _states(mask, rows.reshape(-1, height), columns.reshape(-1, width), G)
            seen = parts != masks.EMPTY
            seen[:, :, -(-len(t) // height) :] = False  # padding
            seen[..., -(-len(s) // width) :] = False
            seen = seen.reshape(*seen.shape[:2], len(rows), _STRIPS, len(columns), _STRIPS)
            inside = states[:, :, :, None, :, None] == masks.PARTIAL
            strips = _strips((seen & inside).any((0, 1, 2, 4)), height, width)
        return cls(states, strips, block_q, block_k)

    def cost(self):
        """In entries of the score matrix, with what tiles cost beside them."""
        sizes = [(q.stop - q.start) * (k.stop - k.start) for q, k in self.strips]
        partial = (self.states == masks.PARTIAL).sum() * (sum(sizes) + len(sizes) * _OVERHEAD)
        full = (self.states == masks.FULL).sum() * (self.block_q * self.block_k + _OVERHEAD)
        return full + partial


def _strips(seen, height, width):
    """(queries, keys) of each strip, from what is visible of their products (strips, strips)."""
    found = []
    spans = [(row.argmax(), len(row) - row[::-1].argmax()) if row.any() else None for row in seen]
    for span, group in itertools.groupby(range(_STRIPS), spans.__getitem__):
        group = list(group)
        if span is not None:
            first, last = group[0] * height, (group[-1] + 1) * height
            found.append((slice(first, last), slice(*(int(x) * width for x in span))))
    return tuple(found)


def _states(mask, rows, columns, G):
    """EMPTY, PARTIAL or FULL for (#B, 1 or K, tq, tk), of tiles with these positions."""
    if mask is None:
        return np.full((1, 1, len(rows), len(columns)), masks.FULL)
    states = mask.tiles(rows, columns)
    module = np if isinstance(states, np.ndarray) else jnp
    if states.shape[1] > 1:  # the G query heads of a key head are computed together
        states = states.reshape(states.shape[0], -1, G, *states.shape[2:])
        least, most = states.min(2), states.max(2)
        states = module.where(least == most, least, masks.PARTIAL)
    return states
