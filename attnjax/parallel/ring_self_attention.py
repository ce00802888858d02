r"""Ring self-attention in two passes: a softmax over full rows, O(T S / P) memory.

    first pass, keys travel:       x_ts for the queries here and all keys; w = softmax(x)
    second pass, values travel:    o_t = sum over pieces i of w_ti v_i

Source: Li et al., "Sequence Parallelism: Long Sequence Training from System Perspective",
arXiv:2105.13120, section 3.2. `ring` does the same in one pass and without the rows.
"""

import functools

import jax.numpy as jnp
from jax import lax

from attnjax.ops import blocked_arguments, dense_attention
from attnjax.parallel import split, travel

_HONOURED = ("q", "k", "v", "mask", "bias", "scale", "softcap", "sinks", "dropout", "score_mod")


def _check(record, call, places):
    if call.options.get("implementation") is not None:
        raise NotImplementedError("ring_self_attention can't honour implementation, ring can")
    split.only(record, call, _HONOURED, by="ring_self_attention")


def _run(record, call, places):
    q, k, v = (call.arrays[name] for name in "qkv")
    ring, scale = travel.Ring(places.axis), call.options.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = dict(scale=scale, softcap=call.options.get("softcap"))
    weights = _softmax(_rows(ring, q, k, options, places), call, places)
    return _mix(ring, weights, v).astype(v.dtype)


def _rows(ring, q, k, options, places):
    """Products of the queries here with all keys in their order, which travel: (B N T S)."""
    score = functools.partial(dense_attention.logits, q, **options)
    last, pieces = lax.scan(lambda k, _: (ring.rotate(k), score(k)), k, length=ring.size - 1)
    pieces = jnp.concatenate([pieces, score(last)[None]])
    source = (ring.here - jnp.arange(ring.size)) % ring.size  # both of a rotation and of a piece
    x = jnp.moveaxis(pieces[source], 0, -2)
    return x.reshape(*x.shape[:-2], -1)[..., : places.sizes["S"]]


def _softmax(x, call, places):
    """Weights (B N T S) of scores, and of none for what the mask hides."""
    t = places.first("T") + jnp.arange(x.shape[2])
    indices = jnp.arange(x.shape[0]), jnp.arange(x.shape[1]), t, jnp.arange(x.shape[3])
    if "bias" in call.arrays:
        x = x + call.arrays["bias"].astype(jnp.float32)
    if call.options.get("score_mod") is not None:
        x = dense_attention.over_tile(call.options["score_mod"])(x, *indices)
    if call.mask is not None:
        x = jnp.where(call.mask.visible(*indices[2:]), x, -jnp.inf)
    peak = jnp.max(x, -1, keepdims=True)
    sinks = call.arrays.get("sinks")
    if sinks is not None:
        sinks = sinks.astype(jnp.float32)[None, :, None, None]
        peak = jnp.maximum(peak, sinks)
    peak = lax.stop_gradient(jnp.where(peak > -jnp.inf, peak, 0.0))
    weights = jnp.exp(x - peak)
    total = weights.sum(-1, keepdims=True) + (0.0 if sinks is None else jnp.exp(sinks - peak))
    weights = weights / jnp.where(total > 0, total, 1.0)
    dropout = call.options.get("dropout")
    if dropout is None:
        return weights
    return jnp.where(dropout.keep(*jnp.ix_(*indices)), weights / (1 - dropout.rate), 0.0)


def _mix(ring, weights, v):
    """The values of all devices, which travel, by the weights: (B T N V)."""
    B, N, T, S = weights.shape
    pad = v.shape[1] * ring.size - S
    weights = jnp.pad(weights, ((0, 0), (0, 0), (0, 0), (0, pad)))
    weights = weights.reshape(B, v.shape[2], -1, ring.size, v.shape[1])

    def add(o, i, v):
        piece = jnp.take(weights, (ring.here - i) % ring.size, 3)
        return o + piece @ v.astype(jnp.float32).swapaxes(1, 2)

    o = blocked_arguments.zeros((*weights.shape[:3], v.shape[-1]), like=weights)
    step = lambda x, i: ((add(x[0], i, x[1]), ring.rotate(x[1])), None)
    (o, v), _ = lax.scan(step, (o, v), jnp.arange(ring.size - 1))
    return add(o, ring.size - 1, v).reshape(B, N, T, -1).swapaxes(1, 2)


STRATEGY = split.Strategy(check=_check, run=_run, papers=("sequence-parallelism",))
