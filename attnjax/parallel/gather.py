"""All keys and values in every device, for its own queries: any mask and option of a function.

An array with letter S (and without T) is gathered; the function is called with the rest as it is
and with `q_offset`, the position of the first query. Source: "context parallelism" of Dubey et
al., "The Llama 3 Herd of Models", arXiv:2407.21783, section 3.3.2. Memory is O(T) for keys and
values and O(T / P) for all else. In the order zigzag (`parallel.travel`) a device has one run of
early queries and one of late ones, and calls the function for each.
"""

import functools
import inspect

import jax.numpy as jnp
from jax import lax

from attnjax.parallel import losses, split, travel


def _check(record, call, places, *, order="contiguous"):
    if order not in ("contiguous", "zigzag"):
        raise ValueError(f"{order=} must be 'contiguous' or 'zigzag'")
    parameters = inspect.signature(record.fn).parameters
    if "q_offset" not in parameters:
        raise NotImplementedError(f"gather needs q_offset of {record.fn.__name__}")
    given = {n: call.options.get(n) for n in ("positions", "return_lse") if n in parameters}
    if any(given.values()) or call.options["q_offset"] is not parameters["q_offset"].default:
        raise NotImplementedError(
            "gather can't honour positions, q_offset or return_lse, no strategy can"
        )
    split.each_query_chooses(call, by="gather")


def _multiple(size, call, *, order="contiguous"):
    return travel.multiple(order, size)


def _run(record, call, places, *, order="contiguous"):
    ring, arrays = travel.Ring(places.axis), {}
    runs = 1 if order == "contiguous" else 2
    for name, x in call.arrays.items():
        arrays[name] = _whole(x, call.letters[name], places)
    along = {
        name: call.letters[name].index(letter)
        for name in arrays
        for letter in ("T", "I")
        if letter in call.letters[name]
    }
    rows = {n: jnp.split(ring.arrange(arrays[n], order, a), runs, a) for n, a in along.items()}
    piece = places.here("T")
    starts = travel.positions(order, ring.here, ring.size, piece)[:: piece // runs]
    options = losses.shared(call.options, piece / runs / places.sizes["T"])
    attend = functools.partial(record.fn, **options | dict(mask=call.mask))
    some = lambda i: arrays | {name: x[i] for name, x in rows.items()}
    o = [attend(**some(i) | dict(q_offset=starts[i])) for i in range(runs)]
    return ring.restore(jnp.concatenate(o, 1), order, 1)


def _whole(x, letters, places):
    """All keys, without those that only fill up, in the place of a device's own."""
    if "S" not in letters:
        return x
    axis = letters.index("S")
    x = lax.all_gather(x, places.axis, axis=axis, tiled=True)
    return lax.slice_in_dim(x, 0, places.sizes["S"], axis=axis)


STRATEGY = split.Strategy(check=_check, run=_run, multiple=_multiple)
