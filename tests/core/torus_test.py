import math

import numpy as np
import pytest

from attnjax.core import torus


def grid(*box):
    return np.array(list(np.ndindex(*box)))


@pytest.mark.parametrize(
    ("box", "ring", "inner"),
    [
        ((16, 16, 1), 4, 1),
        ((4, 8, 8), 16, 1),
        ((8, 8, 8), 16, 4),
        ((2, 3, 5), 30, 1),
        ((3, 4), 12, 1),
        ((4, 4), 2, 4),
        ((4, 4), 1, 4),
    ],
)
def test_neighbours_in_a_ring_are_neighbours(box, ring, inner):
    places = grid(*box) + 3  # the first device needn't be at the origin
    found = torus.in_rings(places, ring, inner)
    assert found.shape == (math.prod(box) // (ring * inner), ring, inner)
    assert sorted(found.reshape(-1)) == list(range(len(places)))
    hops = abs(places[found] - places[np.roll(found, 1, axis=1)]).sum(-1)
    assert (hops == (ring > 1)).all()
    beside = abs(np.diff(places[found], axis=2)).sum(-1)
    assert (beside == 1).all()


def test_what_is_beside_lies_in_the_way_where_it_has_to():
    places = grid(16, 16)
    found = torus.in_rings(places, 64, 2)
    hops = abs(places[found] - places[np.roll(found, 1, axis=1)])
    assert set(map(tuple, hops.reshape(-1, 2).tolist())) == {(0, 1), (2, 0)}


def test_a_ring_cuts_as_few_axes_as_it_can():
    places = grid(4, 8, 8)
    ring = places[torus.in_rings(places, 16, 1)[0, :, 0]]
    assert sorted(np.ptp(ring, axis=0)) == [0, 3, 3] and np.ptp(ring[:, 0]) == 3


@pytest.mark.parametrize(
    ("places", "ring", "inner"),
    [
        (grid(16, 16), 3, 1),  # divides no axis
        (grid(16, 1), 4, 1),  # a line has no way back
        (grid(3, 3), 9, 1),  # nor has an odd number
        (grid(4, 4)[:15], 5, 1),  # a hole
        (np.repeat(grid(2, 2), 2, axis=0), 4, 1),  # two devices at one place
    ],
)
def test_where_there_are_no_such_rings(places, ring, inner):
    assert torus.in_rings(places, ring, inner) is None
