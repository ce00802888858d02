"""The maths of one tile of scores: its scores, its share of the output, and its gradients.

A tile holds the heads of one chunk. It lies as (P, G, queries, keys) in the forward pass and as
(P, keys, G, queries) in the backward pass, where each product then contracts along a row of its
left factor: XLA's products on CPU are half as fast otherwise. Scores are in units of log 2,
because exp2 is cheaper than exp.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.core.masks import Mask
from attnjax.ops.dense_attention import over_tile
from attnjax.ops.dropout import Dropout

LOG2E = math.log2(math.e)


class Options(NamedTuple):
    """What is known while tracing. score_mod takes what it captured before its five scalars."""

    scale: float  # from products to units of log 2
    softcap: float | None
    score_mod: Callable | None


class Place(NamedTuple):
    """Where a tile lies and how."""

    b: jax.Array  # [1] batch index
    n: jax.Array  # [P G] head indices
    t: jax.Array  # [queries] positions
    s: jax.Array  # [keys] positions
    start: tuple  # batch, head, row and column where it starts in the padded score matrix
    exists: jax.Array  # [keys] False for padding
    heads: tuple[int, int]  # P, G
    transposed: bool

    def lay(self, x):
        """(1, 1 or P G, queries, keys) -> the order of axes in which the tile lies."""
        x = x.reshape(*((1, 1) if x.shape[1] == 1 else self.heads), *x.shape[2:])
        return x.transpose(0, 3, 1, 2) if self.transposed else x

    def unlay(self, x):
        """The inverse of `lay` for a tile of P G heads."""
        x = x.transpose(0, 2, 3, 1) if self.transposed else x
        return x.reshape(1, -1, *x.shape[2:])

    def corner(self, x):
        """Start and shape of this tile's part of x, which broadcasts to the score matrix."""
        shape = 1, len(self.n), len(self.t), len(self.s)
        wide = [n > 1 for n in x.shape]
        start = [at if w else 0 for at, w in zip(self.start, wide, strict=True)]
        return start, [n if w else 1 for n, w in zip(shape, wide, strict=True)]

    def part(self, x):
        """This tile's part of x (#B #N #T #S)."""
        return None if x is None else lax.dynamic_slice(x, *self.corner(x))

    def add(self, x, part):
        """x with `part` added at this tile's part."""
        if x is None:
            return None
        return lax.dynamic_update_slice(x, self.part(x) + part, self.corner(x)[0])


def scores(x, bias, captured, given, at: Place, options: Options):
    """Products of queries and keys -> scores, before the mask, in units of log 2."""
    if options.scale != 1:
        x = x * options.scale
    if options.softcap is not None:
        cap = options.softcap * LOG2E
        x = cap * jnp.tanh(x / cap)
    if bias is not None:
        x = x + at.lay(bias.astype(jnp.float32)) * LOG2E
    if options.score_mod is not None:
        score_mod = over_tile(lambda *scalars: options.score_mod(captured, given.constants, *scalars))
        x = at.lay(score_mod(at.unlay(x / LOG2E), at.b, at.n, at.t, at.s)) * LOG2E
    return x


def seen(mask: Mask | None, at: Place):
    """What the tile's queries may see of its keys, laid to broadcast to the tile."""
    exists = at.lay(at.exists[None, None, None])
    if mask is None:
        return exists
    visible = mask.visible(at.t, at.s)
    start, shape = at.corner(visible)
    visible = lax.dynamic_slice(visible, (*start[:2], 0, 0), (*shape[:2], *visible.shape[2:]))
    return at.lay(visible) & exists


def dropped(weights, dropout: Dropout | None, at: Place):
    """Weights of which some are dropped and the others scaled."""
    if dropout is None:
        return weights
    kept = at.lay(dropout.keep(*jnp.ix_(at.b, at.n, at.t, at.s)))
    return jnp.where(kept, weights / (1 - dropout.rate), 0.0)


def attend(carry, q, k, v, bias, captured, given, at: Place, options: Options, partial):
    """Add a tile to (o, peak, total) of the online softmax. q (P G queries H), k (P keys H)."""
    o, peak, total = carry
    x = _product(_rows(q), k.mT).reshape(*q.shape[:-1], -1)
    y = scores(x, bias, captured, given, at, options)
    if partial:
        y = jnp.where(seen(given.mask, at), y, -jnp.inf)
    higher = jnp.maximum(peak, y.max(-1))
    shift = jnp.where(higher == -jnp.inf, 0.0, higher)  # -inf - -inf is NaN
    weights, decay = exp2(y - shift[..., None]), exp2(peak - shift)
    total = total * decay + weights.sum(-1)
    weights = dropped(weights, given.dropout, at)
    return o * decay[..., None] + _product(_rows(weights), v).reshape(o.shape), higher, total


def gradients(q, k, v, keys, do, lse, delta, bias, captured, given, at, options, partial):
    """Of queries (P H G queries), k, v, bias and captured arrays; keys is k as (P H keys).

    All but that of v are per unit of y, so LOG2E times too large.
    """
    q, do = _rows(q), _rows(do)
    square = len(k), k.shape[1], at.heads[1], -1
    score = lambda x, bias, captured: scores(x, bias, captured, given, at, options)
    y, pull = jax.vjp(score, _product(k, q.mT).reshape(square), bias, captured)
    if partial:
        y = jnp.where(seen(given.mask, at), y, -jnp.inf)
    weights = exp2(y - lse[:, None])
    dweights = dropped(_product(v, do.mT).reshape(square), given.dropout, at)
    dx, dbias, dcaptured = pull(weights * (dweights - delta[:, None]))
    dx = dx.reshape(*dx.shape[:2], -1)
    weights = dropped(weights, given.dropout, at).reshape(dx.shape)
    return _product(keys, dx), _product(dx, q), _product(weights, do), dbias, dcaptured


def _rows(x):
    """(P G rows A) -> (P, G rows, A): the heads of a key head are more rows of one product."""
    return x.reshape(len(x), -1, x.shape[-1])


def _product(a, b):
    """a b, summed in float32; float32 weights meet narrower values in the values' dtype."""
    dtype = min(a.dtype, b.dtype, key=lambda x: x.itemsize)
    return jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def exp2(x):
    """2^x for x <= 127 in float32, exactly 0 below -127; has no derivative of its own."""
    return lax.platform_dependent(x, cpu=_exp2_polynomial, default=jnp.exp2)


def _exp2_polynomial(x):
    """XLA's exp2 on CPU takes 2.6 times as long. x = n + r: a polynomial in r times 2^n."""
    x = jnp.maximum(x, -127.0)
    n = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    # adding 1.5 * 2^23 leaves n in the low bits: quicker than a conversion to integers
    n_bits = lax.bitcast_convert_type(n + np.float32(1.5 * 2**23 + 127), jnp.int32)
    power = lax.bitcast_convert_type(n_bits << 23, jnp.float32)
    return functools.reduce(lambda total, c: total * (x - n) + c, _COEFFICIENTS) * power


def _fit(degree):
    """Coefficients for 2^r on [-1/2, 1/2], least squares of the relative error."""
    r = np.cos(np.pi * (np.arange(400) + 0.5) / 400) / 2
    powers = np.vander(r, degree + 1) / 2 ** r[:, None]
    return np.linalg.lstsq(powers, np.ones(len(r)), rcond=None)[0].astype(np.float32)


_COEFFICIENTS = _fit(5)  # within 2e-7 of 2^r
