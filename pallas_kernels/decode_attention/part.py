"""The maths of one part of the keys, shared by every implementation, and how parts are merged.

Queries lie as (K R H) for each sequence: R rows for each key head, row T-major over the T queries
and the G query heads that share it. Source of the sums: Milakov and Gimelshein, "Online normalizer
calculation for softmax"; of the merging: Hong et al., "FlashDecoding++", section 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


class Options(NamedTuple):
    """What is known while tracing."""

    scale: float
    softcap: float | None
    window: int | None  # keys before its own position that a query sees
    T: int  # queries of a sequence
    G: int  # query heads of a key head


class Sums(NamedTuple):
    """The softmax over the keys so far, in float32."""

    values: jax.Array  # (K R V), weighted
    peak: jax.Array  # (K R 1), the largest score
    total: jax.Array  # (K R 1), of weights


class Span(NamedTuple):
    """Where keys and queries of a sequence are; scalars."""

    first: jax.Array  # position of the first key
    stop: jax.Array  # keys from this position on don't count
    start: jax.Array  # position of the first query


def empty(K: int, R: int, V: int) -> Sums:
    """The sums over no key."""
    zeros = lambda size: jnp.zeros((K, R, size), jnp.float32)
    return Sums(zeros(V), zeros(1) - jnp.inf, zeros(1))


def add(options: Options, sums: Sums, q, k, v, span: Span, *, masked: bool) -> Sums:
    """The sums with the keys (K S H) and values (K S V) of a span more.

    Without `masked` every query sees all of them.
    """
    y = _product(q, k, 2) * options.scale
    if options.softcap is not None:
        y = options.softcap * jnp.tanh(y / options.softcap)
    if masked:
        y = jnp.where(_seen(options, span, y.shape), y, -jnp.inf)
        # there may be anything, which a weight of zero wouldn't take out
        v = jnp.where(span.first + _iota(v.shape, 1) < span.stop, v, jnp.zeros_like(v))
    peak = jnp.maximum(sums.peak, y.max(2, keepdims=True))
    shift = jnp.where(peak == -jnp.inf, 0.0, peak)  # -inf - -inf is NaN
    weights, decay = jnp.exp(y - shift), jnp.exp(sums.peak - shift)
    total = sums.total * decay + weights.sum(2, keepdims=True)
    return Sums(sums.values * decay + _product(weights.astype(v.dtype), v, 1), peak, total)


def close(sums: Sums) -> tuple[jax.Array, jax.Array]:
    """(output, lse (K R 1)); zeros and -inf for rows that saw no key."""
    seen = sums.total > 0
    total = jnp.where(seen, sums.total, 1.0)
    return sums.values / total, jnp.where(seen, sums.peak + jnp.log(total), -jnp.inf)


def merge(
    o: Float[Array, "X *rows V"], lse: Float[Array, "X *rows 1"]
) -> tuple[Float[Array, "*rows V"], Float[Array, "*rows 1"]]:
    """The output and lse over the keys of all X parts."""
    peak = lse.max(0)
    shift = jnp.where(peak == -jnp.inf, 0.0, peak)
    weights = jnp.exp(lse - shift[None])
    total = weights.sum(0)
    return close(Sums((o * weights).sum(0), shift, total))


class Shares(NamedTuple):
    """Which groups of keys each part of a sequence has; arrays (B).

    Part x has `each` groups from low + x each on, of which those after the last token are empty.
    """

    low: Int[Array, "B"]  # the first group that any query sees
    each: Int[Array, "B"]  # at least 1


def shares(options: Options, lengths, starts, *, size: int, splits: int) -> Shares:
    """The groups of `size` keys that queries from `starts` on see, shared among the splits."""
    end = jnp.minimum(lengths, jnp.maximum(starts + options.T, 0))
    low = jnp.zeros_like(end)
    if options.window is not None:
        low = jnp.minimum(jnp.maximum(starts - options.window, 0), end) // size
    count = -(-end // size) - low
    return Shares(low, jnp.maximum(-(-count // splits), 1))


def _seen(options, span, shape):
    """Which keys each row sees."""
    t, s = span.start, span.first + _iota(shape, 2)
    if options.T > 1:
        t = t + lax.div(_iota(shape, 1), jnp.int32(options.G))
    seen = (s <= t) & (s < span.stop)
    return seen if options.window is None else seen & (s >= t - options.window)


def _iota(shape, axis):
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _product(a, b, axis: int):
    """Contracts the last axis of `a` with an axis of b, for each head, in float32."""
    dimensions = ((2,), (axis,)), ((0,), (0,))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
