import itertools

import numpy as np
import pytest

from attnjax.core import masks
from attnjax.parallel import reach


def bounds(seen):
    return np.array([(np.flatnonzero(row).min(), np.flatnonzero(row).max()) for row in seen])


@pytest.mark.parametrize("length", [7, 12])
def test_neighborhoods_see_what_the_mask_says(length):
    for window, stride, dilation, causal in itertools.product((1, 3, 4), (1, 2), (1, 2), (0, 1)):
        options = dict(window=window, stride=stride, dilation=dilation, causal=bool(causal))
        resolved, near = reach.of_grid(options, length, 1)
        each = [resolved[name][0] for name in ("window", "stride", "dilation", "causal")]
        seen = masks.Neighborhood((length,), *((value,) for value in each)).along(0)
        assert (np.stack([near.low, near.high], -1) == bounds(seen)).all(), options


@pytest.mark.parametrize(("length", "window", "shift"), [(9, 3, 0), (9, 4, 2), (4, 4, 1)])
def test_windows_see_what_is_in_them(length, window, shift):
    _, near = reach.of_grid(dict(window=window, shift=shift), length, 2)
    number = (np.arange(length) - (shift if length > window else 0)) // window
    seen = number[:, None] == number[None, :]
    assert (np.stack([near.low, near.high], -1) == bounds(seen)).all()


@pytest.mark.parametrize(
    "mask",
    [
        None,
        masks.Causal(),
        masks.Window(3),
        masks.Window(None, 2),
        masks.Window(2, 1) & masks.Prefix(5),
        masks.Neighborhood((3, 4), (2, 3)) & masks.Causal(),
        masks.Causal() | masks.Prefix(2),
    ],
    ids=str,
)
def test_a_device_needs_no_more_than_it_may_see(mask):
    pieces = np.array([[0, 4], [4, 8], [8, 12], [12, 12]])
    need = reach.of_mask(mask, pieces, 12)
    seen = np.array(masks.dense(mask, 12, 12))[0, 0]
    for (first, end), (low, high) in zip(pieces, need, strict=True):
        columns = np.flatnonzero(seen[first:end].any(0))
        assert set(columns) <= set(range(low, high))
    exact = isinstance(mask, masks.Causal | masks.Window)
    if exact:
        assert list(need[1]) == [bounds(seen)[4:8, 0].min(), bounds(seen)[4:8, 1].max() + 1]
    assert need[3, 0] == need[3, 1]
