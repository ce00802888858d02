"""Shifted windows against slices of the grid, their limits, and what two blocks reach."""

import functools
import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit
from attnjax.window.swin import Swin, swin
from tests import cost

KEY = jax.random.key(0)


def grid(X, Y, N=2, H=4):
    return np.random.default_rng(0).normal(size=(3, 2, X, Y, N, H)).astype(np.float32)


def attention(q, k, v):
    """Every token of a grid attends to every token of it, by numpy."""
    q, k, o = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (q, k, v))
    e = np.exp(np.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(np.float32(q.shape[-1])))
    w = e / e.sum(-1, keepdims=True)
    return np.einsum("BNTS,BSNH->BTNH", w, o).reshape(v.shape)


def no_bias(M, N=2):
    return jnp.asarray(np.zeros((1, N, M**2, M**2), np.float32))


@pytest.mark.parametrize("shape", [(6, 6), (7, 5), (4, 8), (1, 4)])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_each_window_attends_to_itself_alone(shape, shift):
    borders = lambda size: sorted({0, *range(shift if size > 3 else 0, size, 3), size})
    slices = [list(itertools.pairwise(borders(size))) for size in shape]
    q, k, v = grid(*shape)
    expected = np.zeros_like(v)
    for (a, b), (c, d) in itertools.product(*slices):
        part = (slice(None), slice(a, b), slice(c, d))
        expected[part] = attention(q[part], k[part], v[part])
    actual = jax.jit(functools.partial(swin, window=3, shift=shift))(q, k, v, no_bias(3))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [0, 2])
def test_a_grid_within_one_window_is_full_attention(shift):
    run = jax.jit(functools.partial(swin, window=5, shift=shift))
    actual = run(*grid(4, 3), no_bias(5))
    chex.assert_trees_all_close(actual, attention(*grid(4, 3)), rtol=1e-5, atol=1e-6)


def test_bias_is_by_cell_of_the_window_in_row_order():
    q, k, v = grid(6, 6)
    cells = np.arange(9).reshape(3, 3)
    bias = np.where(cells.reshape(-1, 1) == cells.T.reshape(1, -1), np.float32(1e3), 0)
    bias = np.broadcast_to(bias.astype(np.float32), (1, 2, 9, 9))
    actual = jax.jit(functools.partial(swin, window=3))(q, k, v, bias)
    transposed = v.reshape(2, 2, 3, 2, 3, 2, 4).swapaxes(2, 4).reshape(v.shape)
    chex.assert_trees_all_close(actual, transposed, atol=1e-6)


def test_two_blocks_cross_borders_only_with_a_shift():
    weights = lambda shift: functools.partial(edit.matrix, swin, window=3, shift=shift)
    both = jax.jit(lambda *arrays: [weights(shift)(*arrays) for shift in (0, 1)])
    first, shifted = jax.device_get(both(*grid(6, 6), no_bias(3)))
    x, y = np.indices((6, 6)).reshape(2, -1) // 3
    window = 2 * x + y
    for second in (first, shifted):
        reach = second @ first
        crosses = reach[:, :, window[:, None] != window[None, :]]
        assert bool(crosses.any()) == (second is shifted)


def test_a_shift_needs_no_more_windows():
    args = *grid(12, 12), no_bias(3)
    sizes = [cost.largest_array(functools.partial(swin, window=3, shift=s), *args) for s in (0, 1)]
    assert sizes[0] == sizes[1]


def test_one_module_serves_every_size_of_grid():
    module = Swin(num_heads=2, head_dim=4, window=3, shift=1)
    params = jax.eval_shape(module.init, KEY, np.ones((1, 6, 6, 8), np.float32))
    assert params["params"]["bias"]["relative"]["table"].shape == (2, 25)
    for shape in ((1, 2, 2, 8), (1, 7, 4, 8)):
        assert jax.eval_shape(module.apply, params, np.ones(shape, np.float32)).shape == shape


def test_arguments_that_do_not_fit():
    q, k, v = map(jnp.asarray, grid(6, 6))
    with pytest.raises(ValueError, match="shift=3 must be .* less than window=3"):
        swin(q, k, v, no_bias(3), window=3, shift=3)
    with pytest.raises(ValueError, match=r"must end in \(49, 49\) for window=7"):
        swin(q, k, v, no_bias(3))
    with pytest.raises(ValueError, match="must be of the same grid"):
        # users run without the annotations' checks
        inspect.unwrap(swin)(q, *grid(5, 6)[1:], no_bias(3), window=3)
