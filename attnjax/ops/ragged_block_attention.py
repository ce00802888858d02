"""Softmax attention in which each query and head has any number of blocks of keys of its own.

As `selected_block_attention`, which gives every query the same number; here the choice is a boolean
array. For each head and block of keys, the queries that chose it are lined up and cut into tiles of
X queries; one loop, as long as there are tiles, does the online softmax in the forward pass and
computes each tile's weights again in the backward pass. So the work is that of the chosen pairs,
each head and block rounded up to whole tiles. Which queries chose a block takes N T L numbers.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax"; the lining up of
queries by block is that of Lu et al., "MoBA", arXiv:2502.13189, section 2.3.

Letters: L blocks, C keys of a block, X queries of a tile, U heads of all examples.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def ragged_block_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B L C K H"],
    v: Float[Array, "B L C K V"],
    chosen: Bool[Array, "B N T L"],
    exists: Bool[Array, "L C"],
) -> Float[Array, "B T N V"]:
    """Attention of each query to the keys of its blocks, with scale 1/sqrt(H).

    Args:
      chosen: which blocks each query and head attends to; has no gradient.
      exists: which keys of a block there are; at least one of each.

    A query that chose nothing gives zeros. Returns v's dtype. No forward-mode derivative.
    """
    (B, T, N, H), (L, C, K) = q.shape, k.shape[1:4]
    heads_first = lambda x: jnp.moveaxis(x.astype(jnp.float32), -2, 1)
    units = heads_first(q).reshape(B * N, T, H) * H**-0.5
    blocks = (heads_first(x).reshape(B * K, L, C, -1) for x in (k, v))
    tiles = lay(chosen.reshape(B * N, T, L), min(T, C))
    o = _attend(units, *blocks, exists, tiles)
    return o.reshape(B, N, T, -1).swapaxes(1, 2).astype(v.dtype)


class Tiles(NamedTuple):
    """Tiles of queries, in the order of heads and, for each, of blocks."""

    order: Int[Array, "U L T"]  # queries that chose a block, one after the other
    count: Int[Array, "U L"]  # how many did
    end: Int[Array, "UL"]  # tiles up to this head and block, with its own
    width: Int[Array, "X"]  # 0 to X - 1

    @property
    def total(self) -> Int[Array, ""]:
        """How many tiles there are."""
        return self.end[-1]

    def place(self, j):
        """Head, block and queries (X) of tile j; T in place of a query that there isn't."""
        unit, (_, L, T) = jnp.searchsorted(self.end, j, side="right"), self.order.shape
        u, i = unit // L, unit % L
        before = jnp.where(unit > 0, self.end[unit - 1], 0)
        row = (j - before) * len(self.width) + self.width
        t = self.order[u, i, jnp.minimum(row, T - 1)]
        return u, i, jnp.where(row < self.count[u, i], t, T)


def lay(chosen: Bool[Array, "U T L"], width: int) -> Tiles:
    """The tiles of `width` queries that a choice needs."""
    u, i, t = jnp.indices((len(chosen), chosen.shape[2], chosen.shape[1]), sparse=True)
    chosen = chosen.swapaxes(1, 2)
    at = jnp.cumsum(chosen, -1)  # counts from 1; a query that didn't choose goes nowhere
    order = jnp.zeros_like(at).at[u, i, jnp.where(chosen, at - 1, t.size)].set(t, mode="drop")
    end = jnp.cumsum(-(-at[..., -1] // width).reshape(-1))
    return Tiles(order, at[..., -1], end, jnp.arange(width))


@jax.custom_vjp
def _attend(q, k, v, exists, tiles):
    """q (U T H) is scaled; k (B*K L C H), v (B*K L C V). All float32."""
    return _forward(q, k, v, exists, tiles)[0]


def _forward(q, k, v, exists, tiles):
    def step(j, carry):
        (u, i, t), g = tiles.place(j), _group(q, k)
        x = jnp.where(exists[i][None], _get(q, u, t) @ k[u // g, i].T, -jnp.inf)
        o, peak, total = (_get(part, u, t) for part in carry)
        top = jnp.maximum(peak, x.max(-1))
        w, old = jnp.exp(x - top[:, None]), jnp.exp(peak - top)
        new = old[:, None] * o + w @ v[u // g, i], top, old * total + w.sum(-1)
        return tuple(x.at[u, t].set(y, mode="drop") for x, y in zip(carry, new, strict=True))

    zero = jnp.zeros_like(q[..., 0])
    start = jnp.zeros_like(q, shape=(*zero.shape, v.shape[-1])), zero - jnp.inf, zero
    o, peak, total = jax.lax.fori_loop(0, tiles.total, step, start)
    total = jnp.where(total > 0, total, 1.0)
    o = o / total[..., None]
    return o, (q, k, v, exists, tiles, o, peak + jnp.log(total))


def _backward(residuals, do):
    q, k, v, exists, tiles, o, lse = residuals
    delta = (do * o).sum(-1)

    def step(j, carry):
        (u, i, t), (dq, dk, dv), g = tiles.place(j), carry, _group(q, k)
        at = u // g, i
        x = jnp.where(exists[i][None], _get(q, u, t) @ k[at].T, -jnp.inf)
        w = jnp.exp(x - _get(lse, u, t, jnp.inf)[:, None])  # 0 for a query that there isn't
        dw = _get(do, u, t) @ v[at].T
        dx = w * (dw - _get(delta, u, t)[:, None])
        dq = dq.at[u, t].add(dx @ k[at], mode="drop")
        return dq, dk.at[at].add(dx.T @ _get(q, u, t)), dv.at[at].add(w.T @ _get(do, u, t))

    start = jax.tree.map(jnp.zeros_like, (q, k, v))
    return *jax.lax.fori_loop(0, tiles.total, step, start), None, None


_attend.defvjp(_forward, _backward)


def _get(x, u, t, fill=0.0):
    return x.at[u, t].get(mode="fill", fill_value=fill)


def _group(q, k):
    """Query heads of a key head."""
    return q.shape[0] // k.shape[0]
