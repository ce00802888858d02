r"""Selective scans over an image along several routes, each a permutation of its cells.

    raster          snake           diagonal        spiral          a pattern has four routes:
    0 1 2           0 1 2           0 1 5           0 1 2           the one shown, its mirror image
    3 4 5           5 4 3           2 4 6           7 8 3           (transposed for raster and
    6 7 8           6 7 8           3 7 8           6 5 4           snake), and the reverse of both

Each route has weights of its own. Source of the raster: Liu et al., "VMamba: Visual State Space
Model", arXiv:2401.10166, section 4.3; of the others: Ji, "MHS-VM", arXiv:2406.05992.

`slow_ss2d` and `walk` say the same token by token, for the oracles of mechanisms that scan images.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnjax.ops import selective_scan as scans
from pallas_kernels import selective_scan as kernels

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
    implementation: kernels.Implementation | None = "xla",
) -> Float[Array, "B X Y N 4 H"]:
    """y of each route at the cells of the image, in x's dtype. O(X Y) time and memory.

    Args:
      select, widen, bias, log_rate, skip: as in `ops.selective_scan.selected_scan`, for the J = 4 N
        routes; those of the first head come first.
      patterns: one for each of the N heads.
      implementation: of the scans, as in `ops.selective_scan`.

    Raises ValueError for patterns that are unknown or not as many as heads.
    """
    B, X, Y, N, H = x.shape
    if len(patterns) != N:
        raise ValueError(f"{patterns=} must be as many as the {N} heads of x {x.shape}")
    order = np.concatenate([routes(pattern, X, Y) for pattern in patterns])
    flat = jnp.repeat(x.reshape(B, X * Y, N, H), ROUTES, axis=2)
    weights = select, widen, bias, log_rate, skip
    y, _ = scans.selected_scan(_permute(flat, order), *weights, implementation=implementation)
    return _permute(y, np.argsort(order, 1)).reshape(B, X, Y, N, ROUTES, H)


def ss2d(
    u: Float[Array, "B X Y H"],
    select: Float[Array, "4 H F"],
    widen: Float[Array, "4 R H"],
    bias: Float[Array, "4 H"],
    log_rate: Float[Array, "4 H M"],
    skip: Float[Array, "4 H"],
    *,
    pattern: Pattern = "raster",
    implementation: kernels.Implementation | None = "xla",
) -> Float[Array, "B X Y H"]:
    """The sum of a pattern's routes, in u's dtype; otherwise as `cross_scan`."""
    weights = select, widen, bias, log_rate, skip
    options = dict(patterns=(pattern,), implementation=implementation)
    y = cross_scan(u[..., None, :], *weights, **options)
    return y.astype(jnp.float32).sum((3, 4)).astype(u.dtype)


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


def slow_ss2d(u, select, widen, bias, log_rate, skip, *, snake=False):
    """`ss2d` of the raster or the snake, token by token in u's dtype."""
    B, X, Y, H = u.shape
    turn = lambda line, number: line[::-1] if snake and number % 2 else line
    rows = [x * Y + y for x in range(X) for y in turn(range(Y), x)]
    columns = [x * Y + y for y in range(Y) for x in turn(range(X), y)]
    orders = np.array([rows, columns, rows[::-1], columns[::-1]])
    each = jax.vmap(walk, (None, *[0] * 6))
    y = each(u.reshape(B, X * Y, H), orders, select, widen, bias, log_rate, skip)
    return y.sum(0).reshape(u.shape)


def walk(u, order, select, widen, bias, log_rate, skip):
    """(B T H): a scan over tokens u (B T H) in this order (T), token by token in u's dtype."""
    R, M = len(widen), log_rate.shape[1]

    def step(h, x):
        r, b, c = jnp.split(x @ select, [R, R + M], -1)
        delta = jnp.logaddexp(r @ widen + bias[None], 0)[..., None]
        h = jnp.exp(delta * -jnp.exp(log_rate)[None]) * h + delta * x[..., None] * b[:, None]
        return h, jnp.einsum("BHM,BM->BH", h, c) + skip[None] * x

    h = jnp.zeros((*u[:, 0].shape, M), u.dtype)
    y = jax.lax.scan(step, h, u[:, order].swapaxes(0, 1))[1]
    return jnp.zeros_like(u).at[:, order].set(y.swapaxes(0, 1))
