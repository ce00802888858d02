r"""Blocks of keys in a ring: queries choose among all, and only what they chose is computed.

    m_l = what stands for block l, its mean or a gate, is sent to all
    each query and head chooses blocks by q . m_l, or by its own gate in the place of q
    keys and values travel around the devices, and each device attends to those blocks of a piece
    that its queries chose, by one online softmax over all pieces

For a function that chooses so (`parallel.block_choice`). A device owns whole blocks: S / P keys,
rounded up to them, so memory is O(T / P) but for the m_l. For each head and block, the queries that
chose it are lined up in tiles (`ops.ragged_block_attention`); a piece that nobody chose costs
nothing but its message. In the backward pass keys and values travel once more, their gradients with
them, in float32. Source: Lu et al., "MoBA", arXiv:2502.13189, section 2.3; Liu et al., "Ring
Attention with Blockwise Transformers", algorithm 1.

Letters: U heads of all examples, Y key heads of all examples, L blocks, C keys of a block, A blocks
of a query, X queries of a tile.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnjax.core import masks
from attnjax.ops import blocked_arguments
from attnjax.ops import ragged_block_attention as ragged
from attnjax.parallel import block_choice, split, travel

_HONOURED = ("q", "k", "v", "gate_q", "gate_k", "mask", "block", "topk")


def _check(record, call, places):
    if not block_choice.is_of(record.fn):
        name = record.fn.__name__
        raise NotImplementedError(f"block_ring can't tell which blocks {name} chooses")
    for option in ("implementation", "distill"):
        if call.options.get(option):
            raise NotImplementedError(f"block_ring can't honour {option}, gather can")
    split.each_query_chooses(call, by="block_ring")
    split.only(record, call, _HONOURED, by="block_ring")
    masks.select(call.mask, masks.Causal, masks.Valid, by="block_ring")
    block, topk = call.options["block"], call.options["topk"]
    if block < 1 or topk < 1:
        raise ValueError(f"{block=} and {topk=} must be at least 1")


def _multiple(size, call):
    known = "block" in call.options and "k" in call.arrays  # else it is refused
    return size * _block(call, call.arrays["k"].shape[1]) if known else size


def _block(call, S):
    return min(call.options["block"], S)


def _run(record, call, places):
    q, k, v = (call.arrays[name] for name in "qkv")
    block = _block(call, places.sizes["S"])
    seen, t, selected = block_choice.Choice.of(call, places, block)
    selected = selected.swapaxes(1, 2).reshape(-1, *selected.shape[1::2])
    scaled = q.astype(jnp.float32) * q.shape[-1] ** -0.5
    heads_first = lambda x: jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], x.shape[-1])
    arrays = heads_first(scaled), heads_first(k), heads_first(v)
    # gradients of arrays that are whole in some axes are summed where this casts
    arrays = blocked_arguments.varying(arrays, like=(arrays, selected, seen))
    o = _attend(_Pieces(travel.Ring(places.axis), block), *arrays, selected, seen, t)
    return o.reshape(len(q), -1, *o.shape[1:]).swapaxes(1, 2).astype(v.dtype)


class _Pieces(NamedTuple):
    """What is known while tracing."""

    ring: travel.Ring
    block: int

    def first(self, i, k):
        """The first block of the keys that are here after i rotations."""
        return (self.ring.here - i) % self.ring.size * (k.shape[1] // self.block)

    def tiles(self, i, k, selected):
        """Those of the queries that chose blocks of the piece."""
        here = self.first(i, k) + jnp.arange(k.shape[1] // self.block)
        chosen = (selected[..., None] == here[None, None, None]).any(2)
        return ragged.lay(chosen, min(selected.shape[1], self.block))

    def cut(self, x):
        """(Y S H) -> (Y L C H)."""
        return x.reshape(len(x), -1, self.block, x.shape[-1])

    def tour(self, visit, carry, travels, last):
        """`carry, travels = visit(i, carry, travels)` in each place of the ring.

        `last` says what of the travellers goes home.
        """

        def step(x, i):
            carry, travels = visit(i, *x)
            return (carry, self.ring.rotate(travels)), None

        (carry, travels), _ = lax.scan(step, (carry, travels), jnp.arange(self.ring.size - 1))
        carry, travels = visit(self.ring.size - 1, carry, travels)
        return carry, self.ring.rotate(last(travels))


class _Tile(NamedTuple):
    """Queries of a head, and a block that they chose."""

    unit: jax.Array
    group: jax.Array  # the unit's key head
    block: jax.Array  # in its piece
    rows: jax.Array  # (X), the number of queries in the place of one that there isn't
    hidden: jax.Array  # (X C)

    @classmethod
    def of(cls, j, tiles, first, q, k, seen, t):
        """Tile j of a piece k (Y L C H) whose first block is the number `first` of all."""
        unit, block, rows = tiles.place(j)
        s = (first + block) * seen.shape[2] + jnp.arange(seen.shape[2])
        exists = seen[unit // (len(q) // len(seen)), first + block]
        at = t.at[rows].get(mode="fill", fill_value=-1)
        hidden = ~exists[None] | (s[None] > at[:, None])
        return cls(unit, unit // (len(q) // len(k)), block, rows, hidden)

    def get(self, x, fill=0.0):
        """The rows of x (U T ...)."""
        return x.at[self.unit, self.rows].get(mode="fill", fill_value=fill)

    def of_piece(self, x):
        """The block of x (Y L C ...), in float32."""
        return x[self.group, self.block].astype(jnp.float32)

    def scores(self, q, k):
        """(X C), -inf where a query doesn't see a key."""
        return jnp.where(self.hidden, -jnp.inf, self.get(q) @ self.of_piece(k).T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(pieces, q, k, v, selected, seen, t):
    """q (U T H) is scaled and float32; k (Y S H), v (Y S V), selected (U T A), seen (B L C)."""
    return _forward(pieces, q, k, v, selected, seen, t)[0]


def _forward(pieces, q, k, v, selected, seen, t):
    def visit(i, carry, kv):
        keys, values = map(pieces.cut, kv)
        tiles, first = pieces.tiles(i, k, selected), pieces.first(i, k)

        def step(j, carry):
            tile = _Tile.of(j, tiles, first, q, keys, seen, t)
            x, (o, peak, total) = tile.scores(q, keys), map(tile.get, carry)
            top = jnp.maximum(peak, x.max(-1))
            shift = jnp.where(top > -jnp.inf, top, 0.0)  # -inf - -inf is NaN
            w, old = jnp.exp(x - shift[:, None]), jnp.exp(peak - shift)
            o = old[:, None] * o + w @ tile.of_piece(values)
            new, at = (o, top, old * total + w.sum(-1)), (tile.unit, tile.rows)
            return tuple(x.at[at].set(y, mode="drop") for x, y in zip(carry, new, strict=True))

        return lax.fori_loop(0, tiles.total, step, carry), kv

    zero = jnp.zeros_like(q[..., 0])
    start = jnp.zeros_like(q, shape=(*zero.shape, v.shape[-1])), zero - jnp.inf, zero
    (o, peak, total), _ = pieces.tour(visit, start, (k, v), lambda kv: ())
    some = jnp.where(total > 0, total, 1.0)
    o = o / some[..., None]
    lse = jnp.where(total > 0, peak + jnp.log(some), jnp.inf)  # inf: then all weights are 0
    return o, (q, k, v, selected, seen, t, o, lse)


def _backward(pieces, residuals, do):
    q, k, v, selected, seen, t, o, lse = residuals
    delta = (do * o).sum(-1)

    def visit(i, dq, travels):
        kv, dkv = travels
        keys, values = map(pieces.cut, kv)
        tiles, first = pieces.tiles(i, k, selected), pieces.first(i, k)

        def step(j, carry):
            dq, dk, dv = carry
            tile = _Tile.of(j, tiles, first, q, keys, seen, t)
            w = jnp.exp(tile.scores(q, keys) - tile.get(lse, jnp.inf)[:, None])
            dw = tile.get(do) @ tile.of_piece(values).T
            dx = w * (dw - tile.get(delta)[:, None])
            dq = dq.at[tile.unit, tile.rows].add(dx @ tile.of_piece(keys), mode="drop")
            at = tile.group, tile.block
            return dq, dk.at[at].add(dx.T @ tile.get(q)), dv.at[at].add(w.T @ tile.get(do))

        dq, *dkv = lax.fori_loop(0, tiles.total, step, (dq, *map(pieces.cut, dkv)))
        return dq, (kv, tuple(x.reshape(*y.shape) for x, y in zip(dkv, kv, strict=True)))

    zeros = lambda x: blocked_arguments.zeros(x.shape, like=x)
    start = (k, v), (zeros(k), zeros(v))
    dq, (dk, dv) = pieces.tour(visit, zeros(q), start, lambda travels: travels[1])
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_attend.defvjp(_forward, _backward)

STRATEGY = split.Strategy(check=_check, run=_run, multiple=_multiple)
