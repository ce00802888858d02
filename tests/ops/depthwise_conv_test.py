"""Against the grouped convolution of XLA, for shared kernels and for one kernel an image."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import depthwise_conv as ops


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


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


@pytest.mark.parametrize(("batch", "sides"), [(1, (3, 3)), (2, (5, 1)), (2, (3, 7))])
def test_equals_a_grouped_convolution(batch, sides):
    slow = lambda x, kernel: jax.vmap(convolve)(x, jnp.broadcast_to(kernel, (2, *sides, 6)))
    both = jax.jit(lambda *args: [with_gradients(fn, *args) for fn in (ops.depthwise_conv, slow)])
    args = normal(0, 2, 4, 5, 6), normal(1, batch, *sides, 6)
    chex.assert_trees_all_close(*both(*args), rtol=1e-5, atol=1e-5)


def test_channels_may_have_several_axes():
    def both(x, kernel):
        heads = ops.depthwise_conv(x.reshape(2, 4, 5, 2, 3), kernel.reshape(1, 3, 3, 2, 3))
        return heads.reshape(x.shape), ops.depthwise_conv(x, kernel)

    chex.assert_trees_all_equal(*jax.jit(both)(normal(0, 2, 4, 5, 6), normal(1, 1, 3, 3, 6)))


def test_the_middle_of_a_kernel_leaves_the_image_and_its_neighbour_shifts_it():
    x, (middle, above) = normal(0, 1, 3, 4, 2), np.zeros((2, 1, 3, 3, 2), "f4")
    middle[:, 1, 1] = above[:, 0, 1] = 1
    run = jax.jit(ops.depthwise_conv)
    chex.assert_trees_all_equal(run(x, middle), x)
    shifted = np.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
    chex.assert_trees_all_equal(run(x, above), shifted)


def test_sums_bfloat16_in_float32():
    x, kernel = jnp.asarray(normal(0, 1, 8, 8, 4), jnp.bfloat16), np.ones((1, 7, 7, 4), "f4")
    both = jax.jit(lambda kernel, *xs: [ops.depthwise_conv(x, kernel) for x in xs])
    short, exact = both(kernel, x, np.asarray(x, np.float32))
    chex.assert_trees_all_equal(short, np.asarray(exact, jnp.bfloat16))


def test_refuses_a_kernel_without_a_middle():
    with pytest.raises(ValueError, match="must have odd sides P=3 and Q=2"):
        ops.depthwise_conv(jnp.ones((1, 4, 4, 2)), jnp.ones((1, 3, 2, 2)))
