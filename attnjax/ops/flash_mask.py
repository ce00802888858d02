"""Masks as a kernel can ask them.

A kernel can't look anything up in an array by position. So a mask becomes a function of positions
and of arrays that the kernel cuts into tiles: by query for the segment of each query, by key for
keys that are valid, and by both only for masks that nothing shorter describes.
"""

import functools
import itertools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import masks


def translate(
    mask: masks.Mask | None, t, s, blocks: tuple[int, int]
) -> tuple[Callable | None, tuple[jax.Array, ...]]:
    """(visible, arrays) for queries and keys at positions t [T] and s [S].

    `visible(t, s, *arrays)` is for a tile that the mask doesn't empty, `blocks` queries by keys:
    positions, and the tile's parts of the arrays (#B #N #T #S), all of the same shape.
    """
    needed = tuple(part for part in masks.parts(mask) if not _decided(part, t, s, blocks))
    return _all(needed, operator.and_, t, s) if needed else (None, ())


def grows(mask: masks.Mask | None, t, s, sizes) -> bool:
    """Whether `translate` would write a mask out for every score, though it holds less itself."""
    held = max((x.size for x in jax.tree.leaves(mask)), default=0)
    arrays = jax.eval_shape(lambda: translate(mask, t, s, sizes[:2])[1])
    return any(min(x.shape[2:]) > 1 and x.size > held for x in arrays)


def _decided(mask, t, s, blocks):
    """Whether tiles are empty or full, because each lies within one block of a selection."""
    if not isinstance(mask, masks.Blocks):
        return False
    tiles = [masks.tile_positions(x, n) for x, n in zip((t, s), blocks, strict=True)]
    tiles = [x // n for x, n in zip(tiles, (mask.block_q, mask.block_k), strict=True)]
    return all(isinstance(x, np.ndarray) and bool((x == x[:, :1]).all()) for x in tiles)


def _translated(mask, t, s):
    """`translate` for any tile."""
    match mask:
        case masks.And(parts):
            return _all(parts, operator.and_, t, s)
        case masks.Or(parts):
            return _all(parts, operator.or_, t, s)
        case masks.Causal():
            return lambda t, s: s <= t, ()
        case masks.Window(left, right):
            return functools.partial(_in_window, left, right), ()
        case masks.Prefix(length):
            return lambda t, s: s < length, ()
        case masks.Segments():
            return lambda t, s, q, kv: q == kv, (_by_query(mask.q[:, t]), _by_key(mask.keys[:, s]))
        case masks.Valid(keys):
            return lambda t, s, valid: valid, (_by_key(keys[:, s]),)
        case masks.Neighborhood():
            return _neighborhood(mask, t, s)
        case _:
            return lambda t, s, visible: visible, (jnp.asarray(mask.visible(t, s)),)


def _all(parts, combine, t, s):
    parts = [_translated(part, t, s) for part in parts]

    def visible(t, s, *arrays):
        arrays = iter(arrays)
        own = lambda x: itertools.islice(arrays, len(x))
        return functools.reduce(combine, [ask(t, s, *own(x)) for ask, x in parts])

    return visible, tuple(itertools.chain.from_iterable(x for _, x in parts))


def _in_window(left, right, t, s):
    lag = t - s
    seen = lag == lag
    if right is not None:
        seen = seen & (lag >= -right)
    return seen if left is None else seen & (lag <= left)


def _neighborhood(mask, t, s):
    """Along each axis the keys of a query are an interval, of every `dilation`-th position."""
    arrays = []
    dilation = mask.dilation or (1,) * len(mask.shape)
    for axis, step in enumerate(dilation):
        stride = int(np.prod(mask.shape[axis + 1 :]))
        q, k = (jnp.asarray(x // stride % mask.shape[axis]) for x in (t, s))
        table = mask.along(axis)
        first, last = table.argmax(1), table.shape[1] - 1 - table[:, ::-1].argmax(1)
        rows = jnp.asarray(first)[q], jnp.asarray(last)[q], q % step
        arrays += [_by_query(x[None]) for x in rows] + [_by_key(x[None]) for x in (k, k % step)]

    def visible(t, s, *arrays):
        seen = t == t
        for first, last, q_line, key, key_line in itertools.batched(arrays, 5):
            seen = seen & (first <= key) & (key <= last) & (q_line == key_line)
        return seen

    return visible, tuple(arrays)


def _by_query(x):
    """(#B T) -> (#B 1 T 1)."""
    return jnp.asarray(x)[:, None, :, None]


def _by_key(x):
    """(#B S) -> (#B 1 1 S)."""
    return jnp.asarray(x)[:, None, None, :]
