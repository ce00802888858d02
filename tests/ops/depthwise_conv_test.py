"""Against the grouped convolution of XLA, for shared kernels and for one kernel an image."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.ops import depthwise_conv as ops

KEY = jax.random.key(0)


def convolve(x, kernel):
    """By XLA, one image and one kernel."""
    X, Y, D = x.shape
    dims = ("NHWC", "HWIO", "NHWC")
    options = dict(window_strides=(1, 1), padding="SAME", dimension_numbers=dims)
    kernel = kernel[:, :, None]
    return jax.lax.conv_general_dilated(x[None], kernel, feature_group_count=D, **options)[0]


def with_gradients(fn, *args):
    o, vjp = jax.vjp(fn, *args)
    return o, vjp(jnp.sin(jnp.arange(o.size)).reshape(o.shape))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sides", [(3, 3), (5, 1), (3, 7)])
def test_equals_a_grouped_convolution(batch, sides):
    x = jax.random.normal(KEY, (2, 4, 5, 6))
    kernel = jax.random.normal(KEY, (batch, *sides, 6))
    slow = lambda x, kernel: jax.vmap(convolve)(x, jnp.broadcast_to(kernel, (2, *sides, 6)))
    run = lambda fn: with_gradients(fn, x, kernel)
    actual, expected = jax.jit(lambda: (run(ops.depthwise_conv), run(slow)))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_channels_may_have_several_axes():
    x, kernel = jax.random.normal(KEY, (2, 4, 5, 6)), jax.random.normal(KEY, (1, 3, 3, 6))
    heads = ops.depthwise_conv(x.reshape(2, 4, 5, 2, 3), kernel.reshape(1, 3, 3, 2, 3))
    chex.assert_trees_all_equal(heads.reshape(x.shape), ops.depthwise_conv(x, kernel))


def test_the_middle_of_a_kernel_leaves_the_image_and_its_neighbour_shifts_it():
    x, kernel = jax.random.normal(KEY, (1, 3, 4, 2)), jnp.zeros((1, 3, 3, 2))
    middle, above = kernel.at[:, 1, 1].set(1), kernel.at[:, 0, 1].set(1)
    chex.assert_trees_all_equal(ops.depthwise_conv(x, middle), x)
    shifted = jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
    chex.assert_trees_all_equal(ops.depthwise_conv(x, above), shifted)


def test_sums_bfloat16_in_float32():
    x, kernel = jax.random.normal(KEY, (1, 8, 8, 4), jnp.bfloat16), jnp.ones((1, 7, 7, 4))
    exact = ops.depthwise_conv(x.astype(jnp.float32), kernel)
    chex.assert_trees_all_equal(ops.depthwise_conv(x, kernel), exact.astype(jnp.bfloat16))


def test_refuses_a_kernel_without_a_middle():
    with pytest.raises(ValueError, match="must have odd sides P=3 and Q=2"):
        ops.depthwise_conv(jnp.ones((1, 4, 4, 2)), jnp.ones((1, 3, 2, 2)))
