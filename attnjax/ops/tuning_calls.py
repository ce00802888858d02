"""What is timed of each operation: calls with sensible arguments, of one size of heads and length.

Arrays are drawn at random, and decays are 0.1 a token. Softmax attention is over everything and
under a causal mask; blocks are chosen as in MoBA, 2 of 32, or of fewer that have 16 keys: by each
query, and by each block of queries. Decoding has one new query for each sequence and a full cache;
a neighborhood is 7 x 7 cells of an image.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnjax.core import masks, paging
from attnjax.ops import decode_attention as decoding
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import neighborhood_attention as neighborhoods
from attnjax.ops import selected_block_attention as blocks
from pallas_kernels import neighborhood
from pallas_kernels.decay_attention import decay_attention
from pallas_kernels.linear_recurrence import linear_recurrence
from pallas_kernels.selective_scan import selective_scan

_SEQUENCES, _SHARED, _PAGE = 8, 4, 128  # of decoding; query heads of a key head; tokens
_WINDOW = 7


class Calls(NamedTuple):
    """How an operation is called.

    Args:
      by_name: functions of arrays; the geometric mean of their times counts.
      draw: (dtype, head_dim, length, heads) -> arrays.
      learned: whether gradients are timed, of all arrays; `draw` has one more then, for a
        cotangent.
    """

    by_name: dict[str, Callable]
    draw: Callable
    learned: bool = True


def _normal(dtype, *shapes):
    keys = map(jax.random.key, range(len(shapes)))
    return tuple(jax.random.normal(*x, dtype) for x in zip(keys, shapes, strict=True))


def _tokens(dtype, head_dim, length, heads):
    """Queries, keys and values of one sequence, and a cotangent."""
    return _normal(dtype, *[(1, length, heads, head_dim)] * 4)


def _recurrence(channels):
    """With a decay of 0.1 a token, of each head or of each channel."""

    def call(q, k, v):
        decay = jnp.full((1, 1, q.shape[2], q.shape[3] if channels else 1), -0.1)
        return linear_recurrence(q, k, v, log_decay=decay)[0]

    return call


def _decay(q, k, v):
    """With a decay of 0.1 a token."""
    return decay_attention(q, k, v, jnp.full(q.shape[2], -0.1))[0]


def _scan(x, delta, v):
    """With 16 states a channel, as most models have."""
    b, c = delta[..., :16], v[..., :16]
    rate, skip = jnp.full((*x.shape[2:], b.shape[-1]), -1.0), jnp.ones(x.shape[2:])
    return selective_scan(x, jax.nn.softplus(delta), rate, b, c, skip)[0]


def _chosen(q, k, v, *, run):
    """Of 32 blocks two, of at least 16 keys: the own one of each run, and one before it."""
    T, N = q.shape[1:3]
    block = max(min(16, T // 2), T // 32)
    query_block = block if run else 1
    run, head = jnp.indices((-(-T // query_block), N))
    own = run * query_block // block
    before = (7919 * run + 104729 * head) % jnp.maximum(own, 1)
    selected = jnp.stack([own, jnp.where(own > 0, before, 1)], -1)[None]
    options = dict(block=block, query_block=query_block, mask=masks.Causal())
    return blocks.selected_block_attention(q, k, v, selected, **options)


def _decoding(dtype, head_dim, length, heads):
    """A query of each sequence, and a full cache with a key head for four query heads."""
    page, kv_heads = math.gcd(length, _PAGE), heads // math.gcd(heads, _SHARED)
    pages = length // page
    pool = (_SEQUENCES * pages, kv_heads, page, head_dim)
    q, k, v = _normal(dtype, (_SEQUENCES, heads, head_dim), pool, pool)
    table = jnp.arange(_SEQUENCES * pages, dtype="int32").reshape(_SEQUENCES, pages)
    return q, paging.PagedCache(k, v, table, jnp.full(_SEQUENCES, length, "int32"))


def _groups(dtype, head_dim, length, heads):
    """Groups of 7 x 7 queries, with all cells that any of them sees, and a cotangent."""
    shape = lambda side: (1, max(1, length // _WINDOW**2), side**2, heads, head_dim)
    q, k = shape(_WINDOW), shape(2 * _WINDOW - 1)
    return _normal(dtype, q, k, k, q)


def _neighborhood(q, k, v):
    """In the middle of an image."""
    cells = lambda side: jnp.indices((side, side)).reshape(2, 1, -1)
    low = jnp.broadcast_to(cells(_WINDOW), (2, *q.shape[1:3]))
    near = neighborhood.Near(cells(2 * _WINDOW - 1), low, low + _WINDOW - 1)
    return neighborhoods.neighborhood_attention(q, k, v, near=near)


CALLS = {
    "linear_recurrence": Calls(
        {"heads": _recurrence(False), "channels": _recurrence(True)}, _tokens
    ),
    "decay_attention": Calls({"causal": _decay}, _tokens),
    "selective_scan": Calls({"causal": _scan}, _tokens),
    "dot_product_attention": Calls(
        {
            "full": ops.dot_product_attention,
            "causal": lambda q, k, v: ops.dot_product_attention(q, k, v, mask=masks.Causal()),
        },
        _tokens,
    ),
    "block_sparse_attention": Calls(
        {name: functools.partial(_chosen, run=name == "runs") for name in ("queries", "runs")},
        _tokens,
    ),
    "decode_attention": Calls({"step": decoding.decode_attention}, _decoding, learned=False),
    "neighborhood_attention": Calls({"image": _neighborhood}, _groups),
}
