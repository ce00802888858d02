r"""Ring attention: keys and values travel around the devices, and partial softmaxes are merged.

    lse = log(sum_i exp(lse_i)),      o = sum_i w_i o_i,      w_i = exp(lse_i - lse)

over the pieces i of the keys. Source: Liu et al., "Ring Attention with Blockwise Transformers",
algorithm 1. Memory is O(T / P) on each of P devices: in the backward pass keys and values travel
once more, their gradients behind them, and each score's weight is exp(score - lse), so that no
output is computed again (`ops.part_of_attention`). Every message leaves while a piece is computed.

Options: `order` says which tokens a device holds (`parallel.travel`): they are sent there before
and the outputs back after. `gradients` is the dtype in which gradients of keys and values travel;
each device adds its part in float32.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnjax.core import masks
from attnjax.ops import blocked_arguments
from attnjax.ops import dot_product_attention as ops
from attnjax.parallel import layout, split, travel

HONOURED = ("q", "k", "v", "mask", "bias", "scale", "softcap", "sinks", "dropout", "score_mod")
HONOURED += ("implementation",)
_OF_PIECES = "scale", "softcap", "implementation"  # what is said to each of them as it stands


def _check(record, call, places, *, order="contiguous", gradients="float32"):
    if gradients not in ("float32", "bfloat16"):
        raise ValueError(f"{gradients=} must be 'float32' or 'bfloat16'")
    split.only(record, call, HONOURED, by="ring")


def _multiple(size, call, *, order="contiguous", gradients="float32"):
    return travel.multiple(order, size)


def _run(record, call, places, *, order="contiguous", gradients="float32"):
    ring = travel.Ring(places.axis)
    return attention(call, places, ring, order=order, gradients=gradients)


def attention(
    call: split.Call,
    places: layout.Places,
    ring: travel.Ring,
    *,
    order: travel.Order,
    gradients: str = "float32",
):
    """Softmax attention of the contiguous pieces that devices in a ring hold: B T N V."""
    q, k, v = (ring.arrange(call.arrays[name], order, 1) for name in "qkv")
    bias = call.arrays.get("bias")
    if bias is not None and "T" in call.letters["bias"]:
        bias = ring.arrange(bias, order, 2)
    S = places.sizes["S"]
    mask = call.mask
    if k.shape[1] * ring.size > S:  # keys that only fill up the last pieces
        real = masks.Prefix(S)
        mask = real if mask is None else mask & real
    score_mod = _within(call.options.get("score_mod"), places)
    score_mod, captured, constants = blocked_arguments.open_closure(score_mod)
    leaves, tree = jax.tree.flatten((mask, call.options.get("dropout"), constants))
    options = {name: call.options[name] for name in _OF_PIECES if name in call.options}
    attend = functools.partial(ops.dot_product_attention, return_lse=True, **options)
    attend_to_part = functools.partial(ops.part_of_attention, **options)
    steps = travel.needed(mask, order, ring.size, q.shape[1], k.shape[1])
    learned = (q, k, v, bias, captured)
    # gradients of arrays that are whole in some axes are summed where this casts
    learned = blocked_arguments.varying(learned, like=(learned, leaves))
    pieces = _Pieces(ring, order, attend, attend_to_part, score_mod, tree, steps, gradients)
    o, lse = _attend(pieces, *learned, leaves)
    if "sinks" in call.arrays:
        with_sink = jnp.logaddexp(lse, call.arrays["sinks"].astype(jnp.float32)[None, None])
        o = o * jnp.exp(lse - with_sink)[..., None]
    return ring.restore(o.astype(v.dtype), order, 1)


def _within(score_mod, places):
    """score_mod that counts a token that only fills up as the last: it has no gradient anyway."""
    T, S = (places.sizes[letter] - 1 for letter in "TS")
    if score_mod is None or (places.length("T") == T + 1 and places.length("S") == S + 1):
        return score_mod
    return lambda x, b, n, t, s: score_mod(x, b, n, jnp.minimum(t, T), jnp.minimum(s, S))


class _Pieces(NamedTuple):
    """What is known while tracing."""

    ring: travel.Ring
    order: travel.Order
    attend: Callable  # (q, k, v, *, mask, bias, dropout, score_mod, positions) -> (o, lse)
    attend_to_part: Callable  # the same of `whole`, which it also takes
    score_mod: Callable | None  # takes captured and constants before its five scalars
    tree: jax.tree_util.PyTreeDef  # of the mask, dropout and constants
    steps: tuple[int, ...]
    gradients: str  # dtype in which they travel

    def keys(self, i, k):
        """Positions of the keys that are here after i rotations."""
        source = (self.ring.here - i) % self.ring.size
        return travel.positions(self.order, source, self.ring.size, k.shape[1])

    def piece(self, attend, i, leaves, q, k, v, bias, captured):
        """(o, lse) of the queries here over those keys by `attend`; `bias` is cut to them."""
        t = travel.positions(self.order, self.ring.here, self.ring.size, q.shape[1])
        mask, dropout, constants = self.tree.unflatten(leaves)
        options = dict(mask=mask, bias=bias, dropout=dropout, positions=(t, self.keys(i, k)))
        if self.score_mod is not None:
            options["score_mod"] = functools.partial(self.score_mod, captured, constants)
        return attend(q, k, v, **options)

    def send(self, grads, by):
        """Gradients of keys and values of the device `by` places before."""
        if by % self.ring.size == 0:
            return grads
        narrow = jax.tree.map(lambda g: g.astype(self.gradients), grads)
        return jax.tree.map(lambda g: g.astype(jnp.float32), self.ring.rotate(narrow, by))

    def tour(self, compute, merge, carry, kv):
        """`carry = merge(i, carry, compute(i, rotations since the last, carry, kv))` for all steps.

        Messages have arrived before anything is merged: a compiler that could hide them behind the
        merging, which takes less time than they, would not let them leave before the computation.
        """
        steps = self.steps

        def visit(i, since, by, carry, kv):
            found, kv = lax.optimization_barrier(
                (compute(i, since, carry, kv), self.ring.rotate(kv, by))
            )
            return merge(i, carry, found), kv

        if len(steps) > 3 and steps == tuple(range(len(steps))):
            # the first has no gradients to send yet, the last no keys to send on
            x = visit(0, 0, 1, carry, kv)
            x, _ = lax.scan(lambda x, i: (visit(i, 1, 1, *x), None), x, jnp.arange(1, steps[-1]))
            return visit(steps[-1], 1, 0, *x)[0]
        gaps = [after - before for before, after in itertools.pairwise((0, *steps))]
        x = carry, self.ring.rotate(kv, steps[0])  # few, or with gaps between
        for i, since, by in zip(steps, gaps, (*gaps[1:], 0), strict=True):
            x = visit(i, since, by, *x)
        return x[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(pieces, q, k, v, bias, captured, leaves):
    def compute(i, since, carry, kv):
        cut = _columns(bias, pieces.keys(i, kv[0]))
        return pieces.piece(pieces.attend, i, leaves, q, *kv, cut, captured)

    def merge(i, carry, found):
        (o, lse), (part, part_lse) = carry, found
        total = jnp.logaddexp(lse, part_lse)
        keep, add = _share(lse, total), _share(part_lse, total)
        return o * keep + part * add, total

    o = blocked_arguments.zeros((*q.shape[:-1], v.shape[-1]), like=q)
    o, lse = pieces.tour(compute, merge, (o, o[..., 0] - jnp.inf), (k, v))
    return o.astype(v.dtype), lse


def _columns(bias, s):
    """The columns of a bias (B N T S) at positions s."""
    whole = bias is None or bias.shape[3] == 1
    return bias if whole else jnp.take(bias, jnp.minimum(s, bias.shape[3] - 1), 3, mode="clip")


def _share(lse, total):
    """exp(lse - total) for each output feature; 0 where nothing is seen."""
    return jnp.exp(lse - jnp.where(total == -jnp.inf, 0.0, total))[..., None]


def _forward(pieces, *args):
    o, lse = _attend(pieces, *args)
    return (o, lse), (*args, o, lse)


def _backward(pieces, residuals, cotangents):
    *learned, leaves, o, lse = residuals
    q, k, v, bias, captured = learned
    attend = functools.partial(pieces.attend_to_part, whole=(o, lse))

    def compute(i, since, carry, kv):
        *_, dkv = carry
        piece = functools.partial(pieces.piece, attend, i, leaves)
        _, pull = jax.vjp(piece, q, *kv, _columns(bias, pieces.keys(i, kv[0])), captured)
        return pull(cotangents), pieces.send(dkv, since)

    def merge(i, carry, found):
        (dq, dbias, dcaptured, _), ((*grads, dcut, dmore), arrived) = carry, found
        dq, *dkv = jax.tree.map(jnp.add, (dq, *arrived), tuple(grads))
        dcaptured = jax.tree.map(jnp.add, dcaptured, dmore)
        return dq, _add_columns(dbias, dcut, pieces.keys(i, k)), dcaptured, tuple(dkv)

    zeros = jax.tree.map(lambda x: blocked_arguments.zeros(x.shape, like=x), learned)
    dq, *dkv, dbias, dcaptured = zeros
    carry = dq, dbias, dcaptured, tuple(dkv)
    dq, dbias, dcaptured, dkv = pieces.tour(compute, merge, carry, (k, v))
    dk, dv = pieces.send(dkv, -pieces.steps[-1])  # home
    grads = [dq, dk, dv, dbias, dcaptured]
    return *jax.tree.map(lambda g, x: g.astype(x.dtype), grads, learned), None


def _add_columns(dbias, dcut, s):
    if dbias is None or dbias.shape[3] == 1:
        return jax.tree.map(jnp.add, dbias, dcut)
    # a key that only fills up has no gradient, wherever it is added
    return dbias.at[..., jnp.minimum(s, dbias.shape[3] - 1)].add(dcut)


_attend.defvjp(_forward, _backward)

STRATEGY = split.Strategy(check=_check, run=_run, multiple=_multiple)
