r"""Selective scans over an image along several routes, each a permutation of its cells.

    raster          snake           diagonal        spiral          a pattern has four routes:
    0 1 2           0 1 2           0 1 5           0 1 2           the one shown, its mirror image
    3 4 5           5 4 3           2 4 6           7 8 3           (transposed for raster and
    6 7 8           6 7 8           3 7 8           6 5 4           snake), and the reverse of both

Each route has weights of its own. Source of the raster: Liu et al., "VMamba: Visual State Space
Model", arXiv:2401.10166, section 4.3; of the others: Ji, "MHS-VM", arXiv:2406.05992.
"""

import functools
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnjax.ops import selective_scan as scans

Pattern = Literal["raster", "snake", "diagonal", "spiral"]
ROUTES = 4  # of a pattern


def cross_scan(
    x: Float[Array, "B X Y N H"],
    select: Float[Array, "J H F"],
    widen: Float[Array, "J R H"],
    bias: Float[Array, "J H"],
    log_rate: Float[Array, "J H M"],
    skip: Float[Array, "J H"],
    *,
    patterns: tuple[Pattern, ...] = ("raster",),
) -> Float[Array, "B X Y N 4 H"]:
    """y of each route at the cells of the image, in x's dtype. O(X Y) time and memory.

    Args:
      select, widen, bias, log_rate, skip: as in `ops.selective_scan.selected_scan`, for the J = 4 N
        routes; those of the first head come first.
      patterns: one for each of the N heads.

    Raises ValueError for patterns that are unknown or not as many as heads.
    """
    B, X, Y, N, H = x.shape
    if len(patterns) != N:
        raise ValueError(f"{patterns=} must be as many as the {N} heads of x {x.shape}")
    order = np.concatenate([routes(pattern, X, Y) for pattern in patterns])
    flat = jnp.repeat(x.reshape(B, X * Y, N, H), ROUTES, axis=2)
    y, _ = scans.selected_scan(_permute(flat, order), select, widen, bias, log_rate, skip)
    return _permute(y, np.argsort(order, 1)).reshape(B, X, Y, N, ROUTES, H)


@functools.cache
def routes(pattern: Pattern, X: int, Y: int) -> Int[np.ndarray, "4 T"]:
    """The cells, by number in row order, in the order in which each route visits them.

    Raises ValueError for an unknown pattern.
    """
    rows = np.arange(X * Y).reshape(X, Y)
    if pattern == "raster":
        pair = rows.reshape(-1), rows.T.reshape(-1)
    elif pattern == "snake":
        pair = _snake(rows), _snake(rows.T)
    elif pattern == "diagonal":
        pair = _diagonal(rows), _diagonal(rows[:, ::-1])
    elif pattern == "spiral":
        pair = _spiral(rows), _spiral(rows[::-1])
    else:
        raise ValueError(f"{pattern=} must be one of {get_args(Pattern)}")
    return np.stack([*pair, *(route[::-1] for route in pair)])


def _snake(cells):
    """Rows, every other one backwards."""
    odd = np.arange(len(cells))[:, None] % 2 == 1
    return np.where(odd, cells[:, ::-1], cells).reshape(-1)


def _diagonal(cells):
    """Diagonals from the first corner on, up and down in turn."""
    row, column = np.indices(cells.shape).reshape(2, -1)
    number = row + column
    return cells.reshape(-1)[np.lexsort((np.where(number % 2, row, column), number))]


def _spiral(cells):
    """Clockwise from the first corner inward: the top row, then what is left, turned."""
    parts = []
    while cells.size:
        parts.append(cells[0])
        cells = np.rot90(cells[1:])
    return np.concatenate(parts)


def _permute(x, order):
    """(B T J H), (J T) -> (B T J H): token t of route j becomes its token order[j, t]."""
    return x[:, order.T, np.arange(len(order))[None]]
