"""Routes visit every cell in the order they should, and a scan along one is a scan in its order."""

import inspect
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import cross_scan as ops
from attnjax.ops import selective_scan as scans

KEY = jax.random.key(0)
every_pattern = pytest.mark.parametrize("pattern", get_args(ops.Pattern))


def inputs(X, Y, N=1, H=3, M=2, R=1):
    keys, J = jax.random.split(KEY, 6), 4 * N
    return dict(
        x=jax.random.normal(keys[0], (2, X, Y, N, H)),
        select=jax.random.normal(keys[1], (J, H, R + 2 * M)),
        widen=jax.random.normal(keys[2], (J, R, H)),
        bias=jax.random.normal(keys[3], (J, H)),
        log_rate=jax.random.normal(keys[4], (J, H, M)),
        skip=jax.random.normal(keys[5], (J, H)),
    )


@every_pattern
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (4, 4), (3, 5), (5, 2)])
def test_each_route_visits_every_cell_once_and_its_reverse_the_other_way(pattern, shape):
    table = ops.routes(pattern, *shape)
    np.testing.assert_array_equal(np.sort(table), np.tile(np.arange(np.prod(shape)), (4, 1)))
    np.testing.assert_array_equal(table[2:], table[:2, ::-1])


@pytest.mark.parametrize(
    ("pattern", "times"),  # at which each cell is visited
    [
        ("raster", [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
        ("snake", [[0, 1, 2], [5, 4, 3], [6, 7, 8]]),
        ("diagonal", [[0, 1, 5], [2, 4, 6], [3, 7, 8]]),
        ("spiral", [[0, 1, 2], [7, 8, 3], [6, 5, 4]]),
    ],
)
def test_routes_go_as_pictured(pattern, times):
    times = np.array(times)
    mirrored = dict(diagonal=times[:, ::-1], spiral=times[::-1]).get(pattern, times.T)
    first, second = (np.argsort(r).reshape(3, 3) for r in ops.routes(pattern, 3, 3)[:2])
    np.testing.assert_array_equal(first, times)
    np.testing.assert_array_equal(second, mirrored)


@every_pattern
def test_all_but_the_raster_step_from_neighbour_to_neighbour(pattern):
    at = np.stack(np.unravel_index(ops.routes(pattern, 4, 5), (4, 5)))
    step = np.abs(np.diff(at, axis=-1)).max()
    assert step == 1 if pattern != "raster" else step > 1


def test_each_route_is_a_scan_in_its_order_with_its_weights():
    args, patterns = inputs(3, 4, N=2), ("snake", "spiral")

    @jax.jit
    def run():
        expected = jnp.zeros((2, 12, 8, 3))
        for j in range(8):
            order = ops.routes(patterns[j // 4], 3, 4)[j % 4]
            w = {name: a[j : j + 1] for name, a in args.items() if name != "x"}
            x = args["x"].reshape(2, 12, 2, 3)[:, order, j // 4 : j // 4 + 1]
            expected = expected.at[:, order, j].set(scans.selected_scan(x, **w)[0][:, :, 0])
        return ops.cross_scan(**args, patterns=patterns), expected.reshape(2, 3, 4, 2, 4, 3)

    chex.assert_trees_all_close(*run(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", ["raster", "snake"])
def test_sum_of_routes_is_the_slow_sum(pattern):
    args = inputs(3, 4)
    u, *weights = args.pop("x")[..., 0, :], *args.values()

    @jax.jit
    def run():
        return ops.ss2d(u, *weights, pattern=pattern), ops.slow_ss2d(
            u, *weights, snake=pattern == "snake"
        )

    chex.assert_trees_all_close(*run(), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_raises():
    with pytest.raises(ValueError, match=r"patterns=\('raster',\) must be as many as the 2 heads"):
        ops.cross_scan(**inputs(2, 2, N=2))
    with pytest.raises(ValueError, match="pattern='circle' must be one of"):
        inspect.unwrap(ops.routes)("circle", 2, 2)  # users run without the annotations' checks
