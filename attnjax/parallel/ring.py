r"""Ring attention: keys and values travel around the devices, and partial softmaxes are merged.

    lse = log(sum_i exp(lse_i)),      o = sum_i w_i o_i,      w_i = exp(lse_i - lse)
    do_i = w_i do,                    dlse_i = w_i (do . (o_i - o) + dlse)

over the pieces i of the keys. Source: Liu et al., "Ring Attention with Blockwise Transformers",
algorithm 1. Memory is O(T / P) on each of P devices: in the backward pass keys and values travel
once more, their gradients beside them, and the outputs of the pieces are computed again. Device i
holds the i-th run of tokens, so under a causal mask the last devices work the most.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnjax.core import masks
from attnjax.ops import blocked_arguments
from attnjax.ops import dot_product_attention as ops
from attnjax.parallel import split

_HONOURED = ("q", "k", "v", "mask", "scale", "softcap", "sinks", "implementation")


def _check(record, call):
    split.only(record, call, _HONOURED, by="ring")


def _run(record, call, *, axis, lengths):
    q, k, v = (call.arrays[name] for name in "qkv")
    mask = call.mask
    if lengths["S"] < k.shape[1] * lax.axis_size(axis):  # keys that only fill up the last piece
        real = masks.Prefix(lengths["S"])
        mask = real if mask is None else mask & real
    leaves, tree = jax.tree.flatten(mask)
    options = {name: x for name, x in call.options.items() if name in _HONOURED}
    attend = functools.partial(ops.dot_product_attention, return_lse=True, **options)
    # gradients of arrays that are whole in some axes are summed where this casts
    qkv = blocked_arguments.varying((q, k, v), like=(q, k, v, leaves))
    o, lse = _attend(_Ring(axis, attend, tree), *qkv, leaves)
    if "sinks" in call.arrays:
        with_sink = jnp.logaddexp(lse, call.arrays["sinks"].astype(jnp.float32)[None, None])
        o = o * jnp.exp(lse - with_sink)[..., None]
    return o.astype(v.dtype)


class _Ring(NamedTuple):
    """What is known while tracing."""

    axis: str
    attend: Callable  # (q, k, v, *, mask, positions) -> (o, lse)
    tree: jax.tree_util.PyTreeDef  # of the mask

    def piece(self, i, leaves, q, k, v):
        """(o, lse) of the queries here over the keys that have arrived after i rotations."""
        here, size = lax.axis_index(self.axis), lax.axis_size(self.axis)
        t = here * q.shape[1] + jnp.arange(q.shape[1])
        s = (here - i) % size * k.shape[1] + jnp.arange(k.shape[1])
        return self.attend(q, k, v, mask=self.tree.unflatten(leaves), positions=(t, s))

    def rotate(self, arrays):
        """The arrays of the device before this one, in a tree."""
        size = lax.axis_size(self.axis)
        return lax.ppermute(arrays, self.axis, [(i, (i + 1) % size) for i in range(size)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring, q, k, v, leaves):
    def see(i, o, lse, kv):
        part, part_lse = ring.piece(i, leaves, q, *kv)
        total = jnp.logaddexp(lse, part_lse)
        keep, add = _share(lse, total), _share(part_lse, total)
        return o * keep + part * add, total

    def step(carry, i):
        o, lse, kv = carry
        return (*see(i, o, lse, kv), ring.rotate(kv)), None

    last = lax.axis_size(ring.axis) - 1
    o = blocked_arguments.zeros((*q.shape[:-1], v.shape[-1]), like=q)
    carry, _ = lax.scan(step, (o, o[..., 0] - jnp.inf, (k, v)), jnp.arange(last))
    o, lse = see(last, *carry)
    return o.astype(v.dtype), lse


def _share(lse, total):
    """exp(lse - total) for each output feature; 0 where nothing is seen."""
    return jnp.exp(lse - jnp.where(total == -jnp.inf, 0.0, total))[..., None]


def _forward(ring, q, k, v, leaves):
    o, lse = _attend(ring, q, k, v, leaves)
    return (o, lse), (q, k, v, leaves, o, lse)


def _backward(ring, residuals, cotangents):
    (q, k, v, leaves, o, lse), (do, dlse) = residuals, cotangents
    do = do.astype(jnp.float32)
    delta = jnp.sum(do * o, -1) - dlse

    def step(carry, i):
        dq, (kv, dkv) = carry
        (part, part_lse), pull = jax.vjp(functools.partial(ring.piece, i, leaves), q, *kv)
        share = _share(part_lse, lse)
        dpart_lse = share[..., 0] * (jnp.sum(do * part, -1) - delta)
        grads = pull(((share * do).astype(part.dtype), dpart_lse))
        dq, *dkv = jax.tree.map(jnp.add, (dq, *dkv), grads)
        return (dq, ring.rotate((kv, tuple(dkv)))), None

    dq, dk, dv = (blocked_arguments.zeros(x.shape, like=x) for x in (q, k, v))
    carry = dq, ((k, v), (dk, dv))
    # after as many rotations as there are devices, gradients are back with their keys
    (dq, (_, (dk, dv))), _ = lax.scan(step, carry, jnp.arange(lax.axis_size(ring.axis)))
    return *(g.astype(x.dtype) for g, x in ((dq, q), (dk, k), (dv, v))), None


_attend.defvjp(_forward, _backward)

STRATEGY = split.Strategy(check=_check, run=_run)
