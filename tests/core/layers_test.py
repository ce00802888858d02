"""Paths and shapes of parameters, by which they are placed and found."""

import chex
import jax
import jax.numpy as jnp

from attnjax.core import layers, sharding

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 5, 12))


def shapes(module, *args):
    """Parameter path -> shape; each of them has a place."""
    params = module.init(KEY, *args)["params"]
    assert jax.tree.leaves(sharding.partition_specs(dict(a=params)))
    leaves = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): x.shape for k, x in leaves}


def test_parameters_are_called_by_what_their_axes_are():
    heads = jnp.ones((2, 5, 3, 4))
    assert shapes(layers.HeadProjection(3, 4), X) == {"heads/kernel": (12, 3, 4)}
    assert shapes(layers.OutputProjection(), heads, 12) == {"merge/kernel": (3, 4, 12)}
    assert shapes(layers.Dense(7), X) == {"dense/kernel": (12, 7), "dense/bias": (7,)}
    assert shapes(layers.Dense(7, use_bias=False), X) == {"dense/kernel": (12, 7)}
    assert shapes(layers.Conv(4, (3,)), X) == {"conv/kernel": (3, 12, 4), "conv/bias": (4,)}
    assert shapes(layers.Table((3, 2))) == {"table": (3, 2)}
    assert layers.Attend(jnp.add).init(KEY, X, X) == {}


def test_heads_are_projected_and_merged_on_any_leading_axes():
    project, merge = layers.HeadProjection(3, 4), layers.OutputProjection()
    params = project.init(KEY, X)
    y = project.apply(params, X)
    kernel = params["params"]["heads"]["kernel"]
    chex.assert_trees_all_close(y, jnp.einsum("BTD,DNH->BTNH", X, kernel), rtol=1e-5, atol=1e-5)
    image = X.reshape(2, 5, 1, 12)
    chex.assert_trees_all_equal(project.apply(params, image), y[:, :, None])
    params = merge.init(KEY, y, 6)
    kernel = params["params"]["merge"]["kernel"]
    expected = jnp.einsum("BTNH,NHD->BTD", y, kernel)
    chex.assert_trees_all_close(merge.apply(params, y, 6), expected, rtol=1e-5, atol=1e-5)


def test_dtype_is_that_of_the_output_and_parameters_stay_float32():
    module = layers.HeadProjection(3, 4, jnp.bfloat16)
    params = module.init(KEY, X)
    assert module.apply(params, X).dtype == jnp.bfloat16
    assert params["params"]["heads"]["kernel"].dtype == jnp.float32


def test_attend_passes_on_all_it_is_given():
    module = layers.Attend(lambda x, y, *, scale: scale * (x - y))
    assert module.apply({}, 3.0, 1.0, scale=2.0) == 4.0
