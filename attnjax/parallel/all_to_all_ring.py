"""Ulysses within runs of devices and a ring across them: as many devices as one alone can't have.

`heads` neighbours along the axis exchange sequences for heads (`all_to_all`), and the devices that
have the same heads form a ring (`ring`). Source: Fang and Zhao, "USP: A Unified Sequence
Parallelism Approach for Long Context Generative AI", arXiv:2405.07719, section 3.1.
"""

import math

from attnjax.parallel import all_to_all, ring, split, travel


def _check(record, call, places, *, heads=None, order="contiguous"):
    devices = _devices(places, heads)
    if devices < 1 or places.size % devices or places.here("N") % devices:
        raise NotImplementedError(
            f"all_to_all_ring can't have {heads=} with N={places.here('N')} heads on "
            f"{places.size} devices, all_to_all_ring(heads={_devices(places, None)}) can"
        )
    split.only(record, call, ring.HONOURED, by="all_to_all_ring")


def _devices(places, heads):
    """As many as the query heads allow, unless it is given."""
    return math.gcd(places.size, places.here("N")) if heads is None else heads


def _multiple(size, call, *, heads=None, order="contiguous"):
    return travel.multiple(order, size)  # enough for every ring, whose size divides this one


def _run(record, call, places, *, heads=None, order="contiguous"):
    devices = _devices(places, heads)
    runs = all_to_all.Heads.of(places, devices)
    across = travel.Ring(places.axis, stride=devices)
    o = ring.attention(runs.enter(call), places, across, order=order)
    return runs.leave(o, call.letters["return"])


STRATEGY = split.Strategy(check=_check, run=_run, multiple=_multiple)
