"""Each device is sent the tokens of its neighbours that its own queries may see, and no others.

Two kinds of function are understood:

- softmax attention over a sequence: what is seen is read off the mask (Causal, Window, Prefix and
  Neighborhood, whatever is combined with them by &);
- windows over a grid (`window.gna`, `window.swin`), whose first axis is split: the function is
  called on a slab, the part of the grid that a device needs, of a size and at a place where its
  windows lie as in the whole.

A border is not special: there a slab is of the same size and reaches further inward. Source: the
halo exchange of stencil codes; for windows of attention, Vaswani et al., "Scaling Local
Self-Attention for Parameter Efficient Visual Backbones", arXiv:2103.12731, section 3.1.
"""

import inspect

import jax.numpy as jnp
import numpy as np

from attnjax.ops import dot_product_attention as ops
from attnjax.parallel import reach, slab, split

_HONOURED = ("q", "k", "v", "mask", "bias", "scale", "softcap", "sinks", "dropout", "score_mod")
_HONOURED += ("implementation",)


def _check(record, call, places):
    if _is_grid(record):
        return
    parameters = inspect.signature(record.fn).parameters
    if not {"q", "k", "v", "mask"} <= set(parameters):
        name = record.fn.__name__
        raise NotImplementedError(f"halo can't tell what {name} sees, it can of a mask or window")
    split.only(record, call, _HONOURED, by="halo")


def _is_grid(record):
    return bool({"stride", "shift"} & set(inspect.signature(record.fn).parameters))


def _run(record, call, places):
    return _over_grid(record, call, places) if _is_grid(record) else _over_keys(call, places)


def _over_keys(call, places):
    """Softmax attention of the queries here to the keys they may see."""
    (T, S), size = (places.sizes[letter] for letter in "TS"), places.size
    need = reach.of_mask(call.mask, _pieces(T, places.here("T"), size), S)
    part = slab.Slab.of(need, S)
    k, v = (part.fetch(call.arrays[name], 1, places.axis) for name in "kv")
    s = part.first(places.axis) + jnp.arange(part.length)
    t = places.first("T") + jnp.arange(places.here("T"))
    options = {name: x for name, x in call.options.items() if name in _HONOURED}
    arrays = {name: x for name, x in call.arrays.items() if name in ("bias", "sinks")}
    if "bias" in arrays and split.COLUMNS in call.letters["bias"]:
        arrays["bias"] = jnp.take(arrays["bias"], s, 3, mode="clip")
    options |= dict(mask=call.mask, positions=(t, s))
    return ops.dot_product_attention(call.arrays["q"], k, v, **arrays, **options)


def _over_grid(record, call, places):
    """The function on a slab of the grid, and of that the rows of this device."""
    letter = call.letters["return"][1]
    length, here = places.sizes[letter], places.here(letter)
    rank = len(call.letters["return"]) - 3
    options = dict(call.options)
    how = {name: options.pop(name) for name in ("implementation",) if name in options}
    options, near = reach.of_grid(options, length, rank)
    pieces = _pieces(length, here, places.size)
    low, high, align, least = near
    seen = lambda a, b: (low[a:b].min(), high[a:b].max() + 1) if a < b else (length, length)
    need = np.array([seen(first, end) for first, end in pieces])
    part = slab.Slab.of(need, length, align=align, least=least)
    arrays = {
        name: part.fetch(x, 1, places.axis) if letter in call.letters[name] else x
        for name, x in call.arrays.items()
    }
    o = record.fn(**arrays, **options, **how)
    rows = places.first(letter) - part.first(places.axis) + jnp.arange(here)
    return jnp.take(o, rows, 1, mode="clip")


def _pieces(length, here, size):
    """(first, end) of the positions in each device, without those that only fill up: (P 2)."""
    first = np.arange(size) * here
    return np.minimum(np.stack([first, first + here], -1), length)


STRATEGY = split.Strategy(check=_check, run=_run)
