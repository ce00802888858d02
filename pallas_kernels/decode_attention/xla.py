"""A loop over groups of pages, as many as the longest sequence has; any platform."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import device_table
from pallas_kernels.decode_attention import part as maths

_KEYS = 256  # that a step gathers of each part: few copies, and large enough products
_ROWS = 256  # of queries in a step: a processor with many cores shares them out


def attend(options: maths.Options, q, k, v, table, lengths, starts, *, V: int, splits: int | None):
    """(o (B K R V), lse (B K R 1)) of q (B K R H), in float32.

    A step has `keys` of the table of the device, or 256, and as many splits as have `rows` of
    queries in all, or 256.
    """
    (B, K, R, _), C, L = q.shape, k.shape[2], table.shape[1]
    most = device_table.tiles(k, table, V, dict(keys=_KEYS, rows=_ROWS), kernel_for=None)
    pages = max(1, min(most["keys"] // C, L))
    size = pages * C
    splits = splits or max(1, min(most["rows"] // (B * K * R), -(-L // pages)))
    low, each = maths.shares(options, lengths, starts, size=size, splits=splits)
    begin = low[None] + jnp.arange(splits)[:, None] * each[None]  # (X B)
    stop = jnp.minimum((begin + each[None]) * size, lengths[None])
    add = jax.vmap(
        lambda *args: maths.add(options, *args, masked=True), (0, 0, 0, 0, maths.Span(0, 0, 0))
    )
    add = jax.vmap(add, (0, None, 0, 0, maths.Span(0, 0, None)))

    def step(state):
        j, sums = state
        at = (begin + j)[..., None] * pages + jnp.arange(pages)[None, None]
        page = jnp.take_along_axis(table[None], jnp.minimum(at, L - 1), 2)
        keys = _gathered(k, page)
        values = keys[..., :V] if v is None else _gathered(v, page)
        return j + 1, add(sums, q, keys, values, maths.Span((begin + j) * size, stop, starts))

    zeros = _zeros(q, k, lengths)
    sums = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (splits, B, *x.shape)) + zeros, maths.empty(K, R, V)
    )
    _, sums = jax.lax.while_loop(lambda state: state[0] < each.max(), step, (0, sums))
    return maths.merge(*maths.close(sums))


def _gathered(pool, page):
    """The pages (X B pages) of a pool, one after the other: (X B K S H)."""
    x = pool.at[page].get(mode="clip").swapaxes(2, 3)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _zeros(*arrays):
    """0.0, which varies over the axes of a mesh that arrays vary over."""
    return sum(jnp.zeros_like(x, jnp.float32, ()) for x in arrays)
