"""Which positions the queries of a device may see: of a mask, and of windows over a grid."""

from typing import Any, NamedTuple

import numpy as np

from attnjax.core import masks


def of_mask(mask: masks.Mask | None, pieces: np.ndarray, S: int) -> np.ndarray:
    """First and end of the keys that the queries first ... end - 1 may see, of each piece: (P 2).

    From the parts of a mask of which it is known; the others may hide more.
    """
    first, last = pieces[:, 0], pieces[:, 1] - 1
    low, high = np.zeros(len(pieces), int), np.full(len(pieces), S)
    for part in masks.parts(mask):
        if isinstance(part, masks.Prefix):
            high = np.minimum(high, part.length)
        if isinstance(part, masks.Causal) or getattr(part, "right", None) is not None:
            high = np.minimum(high, last + getattr(part, "right", 0) + 1)
        if getattr(part, "left", None) is not None:
            low = np.maximum(low, first - part.left)
        if isinstance(part, masks.Neighborhood):
            seen = np.array([_rows(part, *piece) for piece in pieces])
            low, high = np.maximum(low, seen[:, 0]), np.minimum(high, seen[:, 1])
    low = np.minimum(low, S)
    nothing = first > last
    return np.stack([low, np.where(nothing, low, np.maximum(high, low))], -1)


def _rows(near, first, end):
    """The keys in all rows of the grid that a query sees along the first axis: first and end."""
    inner = int(np.prod(near.shape[1:]))
    seen = near.along(0)[first // inner : -(-end // inner)].any(0)
    rows = np.flatnonzero(seen) if first < end else np.zeros(1, int)
    return rows.min() * inner, (rows.max() + 1) * inner


class Near(NamedTuple):
    """What each position of an axis sees, and where the axis may be cut."""

    low: np.ndarray  # (L) the first position that is seen
    high: np.ndarray  # (L) the last
    align: int  # cuts at its multiples leave windows as they are
    least: int  # a part of the axis must have as many positions, lest windows shrink


def of_grid(options: dict[str, Any], length: int, rank: int) -> tuple[dict[str, Any], Near]:
    """(options for a part of the grid's first axis, what is seen along it) for gna or swin."""
    if "shift" in options:
        return options, _swin(length, **options)
    tuples = {n: x if isinstance(x, tuple) else (x,) * rank for n, x in options.items()}
    window, stride, dilation, causal = (
        tuples[name][0] for name in ("window", "stride", "dilation", "causal")
    )
    dilation = min(dilation, length)
    window = min(window, length // dilation)
    stride = min(stride, window)
    first = dict(window=window, stride=stride, dilation=dilation, causal=causal)
    options = {name: (first[name], *values[1:]) for name, values in tuples.items()}
    return options, _gna(length, **first)


def _swin(length, window, shift):
    shift = shift if length > window else 0
    low = (np.arange(length) - shift) // window * window + shift
    high = np.minimum(low + window, length) - 1
    return Near(np.maximum(low, 0), high, window, window + 1)


def _gna(length, window, stride, dilation, causal):
    position = np.arange(length)
    line, index = position % dilation, position // dilation
    count = (length - line + dilation - 1) // dilation
    start = index // stride * stride
    if causal:
        low, high = np.minimum(start + stride, count) - window, index
    else:
        low = np.clip(np.minimum(start + stride // 2, count - 1) - window // 2, 0, count - window)
        high = low + window - 1
    at = lambda index: index * dilation + line
    return Near(at(np.maximum(low, 0)), at(high), stride * dilation, window * dilation)
