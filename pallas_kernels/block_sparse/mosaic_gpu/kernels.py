"""The kernels of flash attention, called with tiles of queries that have one block of keys each.

A unit, which is an example and a key head, is a batch entry with one head to them.
"""

import functools

import jax.numpy as jnp

from pallas_kernels.block_sparse.mosaic_gpu import walk
from pallas_kernels.block_sparse.tile import Options, Tiles
from pallas_kernels.block_sparse.walk import Pairs
from pallas_kernels.flash_attention.mosaic_gpu import backward, sheet
from pallas_kernels.flash_attention.mosaic_gpu import forward as forwards
from pallas_kernels.flash_attention.mosaic_gpu import tile as maths
from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import TILE

_FEATURES = 64  # that wgmma's matrices are laid out by


def forward(options: Options, tiles: Tiles, pairs: Pairs, *, dtype, interpret):
    """(o (U M X V) in dtype, rounded to v's; lse (U M 1 X) in float32).

    0 and -inf for a query that sees nothing, and in tiles that are in no pair.
    """
    given = _options(options), *_learned(options, tiles), _asked(options, tiles, pairs, "row")
    o, lse = forwards.attend(*given, None, _walk(options, pairs), interpret=interpret)
    o = o.reshape(*tiles.q.shape[:3], -1)[..., : tiles.v.shape[-1]]
    return o.astype(dtype), lse.reshape(*tiles.q.shape[:2], 1, -1)


def queries(options: Options, tiles: Tiles, pairs: Pairs, *, dtype, interpret):
    """The gradient (U M X H) of tiles.q in dtype, rounded to q's."""
    dq = _backward(backward.queries, options, tiles, pairs, "row", interpret)
    return dq.reshape(*tiles.q.shape[:3], -1)[..., : tiles.q.shape[-1]].astype(dtype)


def keys(options: Options, tiles: Tiles, pairs: Pairs, *, interpret):
    """The gradients of tiles.k and tiles.v."""
    grads = _backward(backward.keys_and_values, options, tiles, pairs, "column", interpret)
    like = tiles.k, tiles.v
    return tuple(_as_tiles(options, x, y) for x, y in zip(grads, like, strict=True))


def _backward(kernel, options, tiles, pairs, over, interpret):
    of_query = lambda x: x.reshape(len(x), 1, -1)
    lse, delta = of_query(tiles.lse * maths.LOG2E), of_query(tiles.delta)
    arrays = *_learned(options, tiles), _whole(tiles.do), lse, delta
    asked = _asked(options, tiles, pairs, over)
    return kernel(_options(options), *arrays, asked, _walk(options, pairs), interpret=interpret)


def _learned(options, tiles):
    """q, k and v."""
    return _whole(tiles.q), *(_whole(x, options.S) for x in (tiles.k, tiles.v))


def _whole(x, length=None):
    """(U tiles X F) -> (U L 1 F), its first `length` tokens in whole tiles and matrices."""
    x = x.reshape(len(x), -1, 1, x.shape[-1])[:, :length]
    x = sheet.pad(x, 1, -(-x.shape[1] // TILE) * TILE)
    return sheet.pad(x, 3, -(-x.shape[3] // _FEATURES) * _FEATURES)


def _as_tiles(options, x, like):
    """The inverse of `_whole` for keys and values."""
    U, L, block, F = like.shape
    x = sheet.pad(x[:, : options.S, 0, :F], 1, L * block)
    return x.reshape(like.shape)


def _options(options):
    return maths.Options(scale=options.scale, softcap=None, visible=_visible(options), S=options.S)


def _visible(options):
    """(first key of t's block, s, *numbers) -> bool; None where whole tiles are seen."""
    if options.visible is None and options.block % TILE == 0:
        return None

    def visible(first, s, *numbers):
        seen = (first <= s) & (s < first + options.block)
        if options.visible is None:
            return seen
        t, *others = numbers
        return seen & options.visible(t, s, *others)

    return visible


def _asked(options, tiles, pairs, over):
    """What the mask needs; in place of positions of queries, where their blocks begin."""
    if _visible(options) is None:
        return maths.Asked(None, None, ())
    U, M, X, _ = tiles.q.shape
    lay = lambda x: sheet.lay(x, (M * X, -(-options.S // TILE) * TILE), over)
    first = jnp.repeat(pairs.blocks[..., 0] * options.block, X, 1)
    by_query = [x.reshape(U, 1, -1, 1) for x in (first, *tiles.by_query)]
    by_key = [x.reshape(U, 1, 1, -1)[..., : options.S] for x in tiles.by_key]
    s = jnp.arange(options.S, dtype=jnp.int32)[None, None, None]
    first, s, *arrays = map(lay, (by_query[0], s, *by_query[1:], *by_key))
    return maths.Asked(first, s, tuple(arrays))


def _walk(options, pairs):
    masked = _visible(options) is not None or options.S % TILE > 0
    return functools.partial(walk.runs, options, pairs, masked=masked)
