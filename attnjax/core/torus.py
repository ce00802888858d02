"""Rings of devices on the torus of a TPU: each is next to the one before, the last to the first.

The compiler sends what travels around such a ring while it computes. A part of one of the torus's
axes is none, as its ends are far from each other: on v5e:16x16 a ring of 4 waits for every rotation
there, and for none that has work beside it where its devices are a square.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np

Box = tuple[int, ...]  # how many devices along each axis


def in_rings(places: np.ndarray, ring: int, inner: int) -> np.ndarray | None:
    """The devices as rings, each of whose places is next to the one before: (groups ring inner).

    Args:
      places: of each device, its coordinate along each axis: D A.
      ring: how many places a ring has.
      inner: how many devices are at each of them, side by side.

    Returns numbers of devices; where those at one place have to lie in the ring's way, the next
    place is behind them. None where there are no such rings: the devices aren't a whole box, or
    their number along each axis doesn't divide.
    """
    places = places - places.min(0)
    number = {tuple(place): i for i, place in enumerate(places.tolist())}
    whole = tuple(int(n) for n in places.max(0) + 1)
    if len(number) != len(places) or math.prod(whole) != len(places):
        return None
    pairs = itertools.product(_boxes(whole, ring), _boxes(whole, inner))
    fitting = [(a, b) for a, b in pairs if _closed(a) and _divides(whole, a, b)]
    if not fitting:
        return None
    around, beside = min(fitting, key=lambda pair: _cost(whole, *pair))
    steps = [n // (a * b) for n, a, b in zip(whole, around, beside, strict=True)]
    corners = (np.array(corner) * around * beside for corner in np.ndindex(*steps))
    at = lambda corner, a, b: number[tuple((corner + a + b).tolist())]
    paths = [np.array(_cycle(around)) * beside, np.array(_snake(beside))]
    return np.array([[[at(x, a, b) for b in paths[1]] for a in paths[0]] for x in corners])


def _boxes(whole: Box, size: int) -> Iterator[Box]:
    """Those of so many devices that fill the whole one."""
    divisors = ([m for m in range(1, n + 1) if n % m == 0] for n in whole)
    return (box for box in itertools.product(*divisors) if math.prod(box) == size)


def _divides(whole, a, b):
    return all(n % (i * j) == 0 for n, i, j in zip(whole, a, b, strict=True))


def _cost(whole, a, b):
    """Axes along which what is beside lies in the ring's way, then those that the ring cuts."""
    shared = sum(min(pair) > 1 for pair in zip(a, b, strict=True))
    cut = sum(1 < m < n for m, n in zip(a, whole, strict=True))
    return shared, cut, sum(m > 1 for m in a), max(a)


def _closed(box):
    """Whether there is a cycle through a box, no device twice."""
    size = math.prod(box)
    return size <= 2 or (size % 2 == 0 and sum(n > 1 for n in box) > 1)


def _snake(box):
    """All of a box in a row, each next to the one before."""
    row = [()]
    for n in box:
        turns = itertools.cycle((range(n), range(n)[::-1]))
        row = [(*place, i) for place, turn in zip(row, turns, strict=False) for i in turn]
    return row


def _cycle(box):
    """All of a closed box: up and down the columns after the first, and home along that."""
    size = math.prod(box)
    if size <= 2:
        return _snake(box)
    axis = next(i for i, n in enumerate(box) if n % 2 == 0)
    first, *others = _snake((*box[:axis], *box[axis + 1 :]))
    turns = itertools.cycle((others, others[::-1]))
    path = [(rest, i) for i, turn in zip(range(box[axis]), turns, strict=False) for rest in turn]
    path += [(first, i) for i in reversed(range(box[axis]))]
    return [(*rest[:axis], i, *rest[axis:]) for rest, i in path]
