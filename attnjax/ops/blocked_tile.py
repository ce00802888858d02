"""The maths of one tile of scores: its scores, its share of the output, gradients and tangents.

A tile holds the heads of one chunk. It lies as (P, G, queries, keys) in the forward pass and as
(P, keys, G, queries) in the backward pass, where each product then contracts along a row of its
left factor: XLA's products on CPU are half as fast otherwise. Scores are in units of log 2,
because exp2 is cheaper than exp.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnjax.ops.blocked_arguments import Given, Learned, Options
from attnjax.ops.blocked_exp2 import exp2
from attnjax.ops.dense_attention import over_tile
from attnjax.ops.linear_function import push

LOG2E = math.log2(math.e)


class Tile(NamedTuple):
    """Where a tile lies, and how, and what its scores depend on."""

    start: tuple  # batch, head, row and column where it starts in the padded score matrix
    heads: tuple[int, int]  # P, G
    t: jax.Array  # [queries] positions
    s: jax.Array  # [keys] positions
    exists: jax.Array  # [keys] False for padding
    partial: bool  # whether it needs the mask
    transposed: bool
    given: Given
    options: Options

    @property
    def indices(self):
        """b [1], n [P G], t [queries] and s [keys]."""
        b, n = self.start[:2]
        return jnp.reshape(b, 1), n + jnp.arange(math.prod(self.heads)), self.t, self.s

    def lay(self, x):
        """(1, 1 or P G, queries, keys) -> the order of axes in which the tile lies."""
        x = x.reshape(*((1, 1) if x.shape[1] == 1 else self.heads), *x.shape[2:])
        return x.transpose(0, 3, 1, 2) if self.transposed else x

    def unlay(self, x):
        """The inverse of `lay` for a tile of P G heads."""
        x = x.transpose(0, 2, 3, 1) if self.transposed else x
        return x.reshape(1, -1, *x.shape[2:])

    def within(self, queries, keys):
        """The tile of two slices of this one's queries and keys."""
        b, n, row, column = self.start
        return self._replace(
            start=(b, n, row + queries.start, column + keys.start),
            t=self.t[queries],
            s=self.s[keys],
            exists=self.exists[keys],
        )

    def corner(self, x):
        """Start and shape of this tile's part of x, which broadcasts to the score matrix."""
        shape = 1, math.prod(self.heads), len(self.t), len(self.s)
        wide = [n > 1 for n in x.shape]
        start = [at if w else 0 for at, w in zip(self.start, wide, strict=True)]
        return start, [n if w else 1 for n, w in zip(shape, wide, strict=True)]

    def part(self, x):
        """This tile's part of x (#B #N #T #S)."""
        return None if x is None else lax.dynamic_slice(x, *self.corner(x))

    def add(self, x, part):
        """x with `part` added to this tile's part."""
        if x is None:
            return None
        return lax.dynamic_update_slice(x, self.part(x) + part, self.corner(x)[0])


def place(given, options, unit, i, j, *, partial, transposed) -> Tile:
    """The tile of chunk `unit`, query tile i and key tile j."""
    plan = given.schedule
    C, P, G = plan.heads
    return Tile(
        start=(unit // C, unit % C * P * G, i * plan.block_q, j * plan.block_k),
        heads=(P, G),
        t=given.t[i],
        s=given.s[j],
        exists=jnp.asarray(given.exists)[j],
        partial=partial,
        transposed=transposed,
        given=given,
        options=options,
    )


def attend(tile: Tile, carry, q, k, v, learned: Learned):
    """Add a tile to (o, peak, total) of the online softmax. q (P G queries H), k (P keys H)."""
    if not tile.partial:
        return _attend(tile, carry, q, k, v, learned)
    for queries, keys in tile.given.schedule.strips:
        part, here = tile.within(queries, keys), [x[:, :, queries] for x in carry]
        added = _attend(part, here, q[:, :, queries], k[:, keys], v[:, keys], learned)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=queries.start, axis=2)
        carry = tuple(map(put, carry, added))
    return carry


def _attend(tile, carry, q, k, v, learned):
    o, peak, total = carry
    y = _masked(tile, _of_products(tile, q, k, tile.part(learned.bias), learned.captured))
    higher = jnp.maximum(peak, y.max(-1))
    shift = jnp.where(higher == -jnp.inf, 0.0, higher)  # -inf - -inf is NaN
    weights, decay = exp2(y - shift[..., None]), exp2(peak - shift)
    total = total * decay + weights.sum(-1)
    weights = _dropped(tile, weights)
    return o * decay[..., None] + _product(_rows(weights), v).reshape(o.shape), higher, total


def gradients(tile: Tile, q, k, v, keys, do, lse, delta, learned: Learned):
    """Of queries (P H G queries), k, v, bias and captured arrays; keys is k as (P H keys).

    All but that of v are per unit of y, so LOG2E times too large.
    """
    q, do = _rows(q), _rows(do)
    square = len(k), k.shape[1], tile.heads[1], -1
    scores = lambda *args: _scores(tile, *args)
    x = _product(k, q.mT).reshape(square)
    y, pull = jax.vjp(scores, x, tile.part(learned.bias), learned.captured)
    weights = exp2(_masked(tile, y) - lse[:, None])
    dweights = _dropped(tile, _product(v, do.mT).reshape(square))
    dx, dbias, dcaptured = pull(weights * (dweights - delta[:, None]))
    dx = dx.reshape(*dx.shape[:2], -1)
    weights = _dropped(tile, weights).reshape(dx.shape)
    return _product(keys, dx), _product(dx, q), _product(weights, do), dbias, dcaptured


def tangents(tile: Tile, carry, arrays, moved, lse, learned: Learned, tangents: Learned):
    """Add a tile to (sum of p dy v + p dv, sum of p dy) over keys, in float32.

    arrays are q, k and v as for `attend`, `moved` their tangents. lse is in units of log 2, and inf
    where nothing is seen. A tangent that is None is zero.
    """
    (q, k, v), (dq, dk, dv) = arrays, moved
    primals = q, k, tile.part(learned.bias), learned.captured
    changes = dq, dk, tile.part(tangents.bias), tangents.captured
    y, dy = push(functools.partial(_of_products, tile), primals, changes)
    weights = exp2(_masked(tile, y) - lse[..., None])
    change = weights * (dy / LOG2E)
    out = _product(_rows(_dropped(tile, change)), v)
    if dv is not None:
        out = out + _product(_rows(_dropped(tile, weights)), dv)
    return carry[0] + out.reshape(carry[0].shape), carry[1] + change.sum(-1)


def _of_products(tile, q, k, bias, captured):
    """Scores before the mask, of a tile that isn't transposed."""
    x = _product(_rows(q), k.mT).reshape(*q.shape[:-1], -1)
    return _scores(tile, x, bias, captured)


def _scores(tile, x, bias, captured):
    """Products of queries and keys -> scores, before the mask."""
    options = tile.options
    x = x * options.scale
    if options.softcap is not None:
        cap = options.softcap * LOG2E
        x = cap * jnp.tanh(x / cap)
    if bias is not None:
        x = x + tile.lay(bias.astype(jnp.float32)) * LOG2E
    if options.score_mod is not None:
        score_mod = lambda *scalars: options.score_mod(captured, tile.given.constants, *scalars)
        x = tile.lay(over_tile(score_mod)(tile.unlay(x / LOG2E), *tile.indices)) * LOG2E
    return x


def _masked(tile, y):
    """-inf where a query may not see a key, or where the key is padding."""
    if not tile.partial:
        return y
    seen = tile.lay(tile.exists[None, None, None])
    if tile.given.mask is not None:
        visible = tile.given.mask.visible(tile.t, tile.s)
        (b, n, _, _), shape = tile.corner(visible)
        visible = lax.dynamic_slice(visible, (b, n, 0, 0), (*shape[:2], *visible.shape[2:]))
        seen = seen & tile.lay(visible)
    return jnp.where(seen, y, -jnp.inf)


def _dropped(tile, weights):
    """Weights of which some are dropped and the others scaled."""
    dropout = tile.given.dropout
    if dropout is None:
        return weights
    kept = tile.lay(dropout.keep(*jnp.ix_(*tile.indices)))
    return jnp.where(kept, weights / (1 - dropout.rate), 0.0)


def _rows(x):
    """(P G rows A) -> (P, G rows, A): the heads of a key head are more rows of one product."""
    return x.reshape(len(x), -1, x.shape[-1])


def _product(a, b):
    """a b, summed in float32; float32 weights meet narrower values in the values' dtype."""
    dtype = min(a.dtype, b.dtype, key=lambda x: x.itemsize)
    return jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)
