"""Attention as a function with a gradient, from arrays as they come to tiles and back.

Kept for the backward pass are output and lse of each query, not those of its pieces: weights are
computed again by the whole lse, so that the gradients of pieces only have to be summed.
"""

import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse import rows as layouts
from pallas_kernels.block_sparse.tile import Options, Tiles

_ROWS = 16  # tiles that a block is cut into have whole ones of these


class Static(NamedTuple):
    """What is known while tracing."""

    kernels: ModuleType  # with `forward`, `queries` and `keys`: those of a platform
    options: Options
    query_block: int  # queries that share what they selected
    size: int  # X, queries of a tile
    interpret: object


class Learned(NamedTuple):
    """What has gradients: (B T N H), (B S K H), (B S K V)."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


class Given(NamedTuple):
    """What has none."""

    selected: jax.Array  # (B I N A)
    by_query: tuple[jax.Array, ...]  # (#B T)
    by_key: tuple[jax.Array, ...]  # (#B S)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(static: Static, learned: Learned, given: Given) -> jax.Array:
    """o (B T N V)."""
    return _forward(static, learned, given)[0]


def _forward(static, learned, given):
    rows = _rows(static, learned, given)
    tiles = _tiles(static, learned, given, rows)
    args = static.options, tiles, rows.pairs
    dtype = rows.output(learned.v.dtype)
    o, lse = static.kernels.forward(*args, dtype=dtype, interpret=static.interpret)
    o, lse = rows.merge(o, lse[:, :, 0])
    o = _by_token(o, learned.q).astype(learned.v.dtype)
    return o, (learned, given, rows, o, lse)


def _backward(static, residuals, do):
    learned, given, rows, o, lse = residuals
    K, do = learned.k.shape[2], jnp.asarray(do)
    delta = _by_unit(jnp.sum(do.astype(jnp.float32) * o, -1), K)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # sees nothing: its weights must be 0, not NaN
    of_output = dict(lse=rows.take(lse, jnp.inf)[:, :, None], delta=rows.take(delta)[:, :, None])
    of_output["do"] = rows.take(_by_unit(do, K))
    tiles = _tiles(static, learned, given, rows)._replace(**of_output)
    args = static.options, tiles, rows.pairs
    dtype = rows.output(learned.q.dtype)
    dq = static.kernels.queries(*args, dtype=dtype, interpret=static.interpret)
    dk, dv = static.kernels.keys(*args, interpret=static.interpret)
    dq = _by_token(rows.sum(dq), learned.q).astype(learned.q.dtype)
    dk, dv = (_join(static, rows.pairs, x, learned.k) for x in (dk, dv))
    return Learned(dq, dk, dv), None


attend.defvjp(_forward, _backward)


def _rows(static, learned, given):
    """How queries lie in tiles."""
    (T, N), (S, K), X = learned.q.shape[1:3], learned.k.shape[1:3], static.size
    if static.query_block == 1:
        lay = functools.partial(layouts.lay, L=-(-S // static.options.block), X=X)
        return layouts.Gathered(jax.vmap(lay)(_by_unit(given.selected, K)))
    blocks = jnp.repeat(given.selected, static.query_block // X, 1)[:, : -(-T // X)]
    return layouts.Cut(_by_unit(blocks, K), heads=N // K, length=T, size=X)


def _tiles(static, learned, given, rows):
    """Everything cut into tiles."""
    (B, _, N, _), K = learned.q.shape, learned.k.shape[2]
    by_head = lambda x, heads: jnp.broadcast_to(x[:, :, None], (B, x.shape[1], heads))
    row = lambda x: rows.take(_by_unit(by_head(x, N), K))[:, :, None]
    column = lambda x: _cut(static, by_head(x, K))[:, :, None]
    return Tiles(
        q=rows.take(_by_unit(learned.q, K)),
        k=_cut(static, learned.k),
        v=_cut(static, learned.v),
        by_query=tuple(map(row, given.by_query)),
        by_key=tuple(map(column, given.by_key)),
    )


def _by_unit(x, K):
    """(B T N ...) -> (B K, G T, ...)."""
    B, _, N, *rest = x.shape
    return x.swapaxes(1, 2).reshape(B * K, -1, *rest)


def _by_token(x, like):
    """(B K, G T, F) -> (B T N F), as many as those of `like`."""
    B, T, N, _ = like.shape
    return x.reshape(B, N, T, -1).swapaxes(1, 2)


def _cut(static, x):
    """(B S K ...) -> (B K, tiles of keys, keys, ...), blocks and tiles filled up by zeros."""
    block, parts = static.options.block, static.options.parts
    rows = parts * _ROWS if parts > 1 else 1
    x = _pad(_by_unit(x, x.shape[2]), 1, block)
    x = _pad(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 2, rows)
    return x.reshape(x.shape[0], x.shape[1] * parts, -1, *x.shape[3:])


def _join(static, pairs, x, like):
    """The inverse of `_cut` for gradients, zero for blocks that no query selected."""
    (B, S, K, _), block = like.shape, static.options.block
    x = x.reshape(x.shape[0], -1, static.options.parts * x.shape[2], x.shape[3])
    x = jnp.where(_selected(pairs, x.shape[1])[..., None, None], x, 0)
    x = x[:, :, :block].reshape(B, K, -1, x.shape[3])
    return x[:, :, :S].swapaxes(1, 2)


def _selected(pairs, L):
    """Blocks (U L) that any tile attends to."""
    (U, M, _), blocks = pairs.blocks.shape, pairs.blocks
    exists = (jnp.arange(M)[None] < pairs.count[:, None])[..., None]
    u = jnp.arange(U)[:, None, None]
    return jnp.zeros((U, L), bool).at[u, jnp.where(exists, blocks, L)].set(True, mode="drop")


def _pad(x, axis, multiple):
    widths = [(0, -n % multiple if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths)
