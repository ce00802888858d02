import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import paroattention as paro
from tests.sparse import helpers

GRID = (8, 3, 4)
ROWS = ((0, 1, 2),)  # the order of the grid, of one head
ORDERS = tuple(itertools.permutations(range(3)))


def flat(x):
    return x.reshape(x.shape[0], -1, *x.shape[-2:])


def full(q, k, v):
    return ops.dot_product_attention(*map(flat, (q, k, v))).reshape(v.shape)


def planted():
    """A head that attends along time, its values alike along time: q, k, v and weights (N T T)."""
    draw = helpers.normal(2, 1, 1, *GRID[1:], 1, 16).repeat(GRID[0], 2)
    place, v = draw[0] / np.linalg.norm(draw[0], axis=-1, keepdims=True), draw[1]
    noise = np.float32(0.1) * helpers.normal(3, *place.shape, seed=1)
    q, k = 12 * (place + noise[0] / 3), 3 * (place + noise[1] / 3)
    v = np.exp(2 * draw[1][..., :1]) * (v + noise[2])  # of its own size at each place
    return q, k, v, helpers.weights(flat(q), flat(k), is_causal=False)[0]


def test_all_orders_together_are_plain_attention():
    run = functools.partial(paro.paroattention, orders=ORDERS)
    helpers.assert_same(run, full, tuple(helpers.normal(3, 2, *GRID, 6, 8)))


def blocks_needed(weights, order, mass=0.95):
    """The fewest blocks that hold a share of a head's weight."""
    at = paro.places(GRID, order)
    sums = weights[0][at][:, at].reshape(12, 8, 12, 8).sum((1, 3)).ravel()
    falling = np.sort(sums)[::-1]
    return int((np.cumsum(falling) < mass * sums.sum()).sum()) + 1


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_head_that_attends_along_time_gets_time_as_its_fastest_axis(alpha):
    weights = planted()[-1]
    (order,) = paro.choose(weights, GRID, block=8, alpha=alpha)
    assert order[-1] == 0
    assert blocks_needed(weights, ROWS[0]) >= 3 * blocks_needed(weights, order)


def errors(weights, q, k, v, **options):
    """Relative to the output: of the chosen order, and of that of the grid."""
    chosen, found = paro.choose(weights, GRID, block=8), []
    for orders in (chosen, ROWS):
        density = options.get("density", 1.0)
        selected = paro.select(weights, GRID, orders, density=density, block=8)
        rest = dict(orders=orders, block=8, bits=options.get("bits"))
        o = helpers.program(lambda *x, s=selected, r=rest: paro.paroattention(*x, s, **r))(q, k, v)
        exact = (weights @ flat(v)[0].swapaxes(0, 1)).swapaxes(0, 1).reshape(v.shape)
        norm = lambda x: np.linalg.norm(x, axis=-1)
        found.append(float(np.mean(norm(o - exact) / norm(exact))))
    return found


@pytest.mark.parametrize("options", [dict(density=0.2), dict(bits=8), dict(bits=4, density=0.2)])
def test_reordering_loses_less(options):
    q, k, v, weights = planted()
    reordered, plain = errors(weights, q, k, v, **options)
    assert reordered < 0.7 * plain


def test_the_heaviest_blocks_are_selected_and_no_row_is_empty():
    weights = np.random.default_rng(0).uniform(size=(2, 96, 96)) ** 8
    orders = ((2, 0, 1), (0, 1, 2))
    for density in (0.0, 0.3, 1.0):
        selected = paro.select(weights, GRID, orders, density=density, block=16)
        for n, order in enumerate(orders):
            at = paro.places(GRID, order)
            mass = weights[n][at][:, at].reshape(6, 16, 6, 16).sum((1, 3))
            least = np.sort(mass.ravel())[::-1][: round(36 * density)].min(initial=np.inf)
            expected = (mass >= least) | (mass == mass.max(-1, keepdims=True))
            np.testing.assert_array_equal(selected[n], expected)


def test_rounding_to_many_bits_changes_little_and_to_fewer_more():
    run = functools.partial(paro.paroattention, orders=((1, 0), (0, 1)), block=4)
    every = helpers.program(lambda *x: ([run(*x, bits=bits) for bits in (14, 8, 4)], full(*x)))
    rounded, exact = every(*helpers.normal(3, 2, 5, 3, 2, 8))
    error = [np.abs(x - exact).max() for x in rounded]
    assert error[0] < 1e-3 < error[1] < error[2] < 1


def test_a_row_without_blocks_gives_zeros():
    selected = np.eye(3, dtype=bool)[None] & (np.arange(3) != 1)
    run = functools.partial(paro.paroattention, block=2)
    both = helpers.program(lambda *x: [run(*x, selected, bits=bits) for bits in (None, 8)])
    for o in both(*helpers.normal(3, 1, 6, 1, 4)):
        assert not o[:, 2:4].any() and o[:, :2].any() and np.isfinite(o).all()


@pytest.mark.parametrize(
    "options", [dict(orders=ROWS), dict(orders=((0, 1, 1),) * 2), dict(bits=1)]
)
def test_refuses_what_it_cannot_do(options):
    args = jnp.ones((3, 1, *GRID, 2, 4))
    with pytest.raises(ValueError, match="must be"):
        paro.paroattention(*args, **options)
