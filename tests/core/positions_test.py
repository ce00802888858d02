"""Products of rotated vectors, slopes, waves and tables of offsets."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import positions

KEY = jax.random.key(0)


def rotated_product(rotate, t, s):
    """Products of two fixed vectors placed at t and s."""
    q, k = jax.random.normal(KEY, (2, 1, 1, 1, 12))
    return (rotate(q, t) * rotate(k, s)).sum()


def test_rotary_depends_on_the_difference_alone():
    product = lambda t, s: rotated_product(positions.rotary, jnp.array([t]), jnp.array([s]))
    chex.assert_trees_all_close(product(9, 4), product(105, 100), rtol=1e-4)
    assert abs(product(9, 4) - product(9, 5)) > 1e-2


def test_rotary_by_hand():
    """Four features: the pairs (0, 2) and (1, 3) turn by t and by t / 100."""
    x, t = jnp.array([1.0, 2.0, 0.0, 0.0])[None, None, None], 3
    y = positions.rotary(x, jnp.array([t]))[0, 0, 0]
    expected = [np.cos(t), 2 * np.cos(t / 100), np.sin(t), 2 * np.sin(t / 100)]
    chex.assert_trees_all_close(y, jnp.array(expected, jnp.float32), rtol=1e-6)
    chex.assert_trees_all_equal(positions.rotary(x, jnp.array([0])), x)


def test_rotary_keeps_lengths_and_dtype():
    x = jax.random.normal(KEY, (2, 5, 3, 8))
    y = positions.rotary(x, jnp.arange(5))
    norm = lambda x: jnp.linalg.norm(x, axis=-1)
    chex.assert_trees_all_close(norm(y), norm(x), rtol=1e-5)
    assert positions.rotary(x.astype(jnp.bfloat16), jnp.arange(5)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="H=7 must be even"):
        positions.rotary(x[..., :7], jnp.arange(5))


def test_rotary_grid_depends_on_the_offset_along_each_axis():
    product = lambda t, s: rotated_product(
        positions.rotary_grid, jnp.array([t], float), jnp.array([s], float)
    )
    chex.assert_trees_all_close(product([5, 1.5], [3, 4]), product([2, 2.5], [0, 5]), rtol=1e-4)
    for other in ([4.0, 4.0], [3.0, 5.0]):
        assert abs(product([5, 1.5], [3, 4]) - product([5, 1.5], other)) > 1e-3


def test_rotary_grid_of_one_axis_is_rotary():
    x, t = jax.random.normal(KEY, (2, 5, 3, 8)), jnp.arange(5)
    grid = positions.rotary_grid(x, t[:, None].astype(float), base=50.0)
    chex.assert_trees_all_close(grid, positions.rotary(x, t, base=50.0), rtol=1e-6)
    with pytest.raises(ValueError, match="H=8 must be a multiple of twice the 3 axes"):
        positions.rotary_grid(x, jnp.zeros((5, 3)))


def test_alibi_of_eight_heads_halves_from_head_to_head():
    """The paper's example: 1/2, 1/4 ... 1/256."""
    np.testing.assert_allclose(positions.alibi_slopes(8), 2.0 ** -np.arange(1, 9), rtol=1e-6)
    mod = positions.alibi(8)
    assert mod(1.0, 0, 1, 7, 3) == 1.0 - 4 / 4 == mod(1.0, 0, 1, 3, 7)


def test_sinusoidal_has_one_wave_for_each_pair():
    waves = positions.sinusoidal(7, 6)
    chex.assert_trees_all_close(waves[:, 0], jnp.sin(jnp.arange(7.0)), rtol=1e-6)
    chex.assert_trees_all_close(waves[:, :3] ** 2 + waves[:, 3:] ** 2, jnp.ones((7, 3)), rtol=1e-5)
    assert positions.sinusoidal(4, 5).shape == (4, 5)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 1, 3)])
def test_relative_index_is_one_number_for_each_offset(shape):
    index, cells = positions.relative_index(shape), positions.grid_coordinates(shape)
    number = {}
    for t, a in enumerate(cells):
        for s, b in enumerate(cells):
            assert number.setdefault(tuple(a - b), index[t, s]) == index[t, s]
    count = np.prod([2 * n - 1 for n in shape])
    assert sorted(number.values()) == list(range(count))


def test_relative_bias_depends_on_the_offset():
    module = positions.RelativeBias(2, (2, 3))
    bias = module.apply(module.init(KEY))
    assert bias.shape == (1, 2, 6, 6)
    chex.assert_trees_all_equal(bias[..., 0, 1], bias[..., 4, 5])  # one to the right
    assert (bias[..., 0, 1] != bias[..., 1, 0]).all()
