"""The size of ECA's kernel, and which channels a gate listens to."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.channel_spatial import eca_net as eca_file
from attnjax.channel_spatial.eca_net import EcaNet, adaptive_size, eca_net

KEY = jax.random.key(0)
RESNET50 = 3 * [256] + 4 * [512] + 6 * [1024] + 3 * [2048]


@pytest.mark.parametrize("ties, total", [("down", 80), ("up", 86)])
def test_parameters_of_resnet50(ties, total):
    assert sum(adaptive_size(D, ties=ties) for D in RESNET50) == total


def test_size_is_the_nearest_odd_number():
    for D in range(1, 5000):
        t = (math.log2(D) + 1) / 2
        distance = min(abs(t - odd) for odd in range(1, 99, 2))
        down, up = adaptive_size(D), adaptive_size(D, ties="up")
        assert down % 2 == up % 2 == 1
        assert abs(down - t) == abs(up - t) == distance
        assert up - down == (2 if distance == 1 else 0)


@pytest.mark.parametrize("size", [None, 1, 3])
def test_module_has_one_kernel_and_nothing_else(size):
    params = jax.eval_shape(EcaNet(size=size).init, KEY, jnp.ones((1, 2, 2, 256)))
    (kernel,) = jax.tree.leaves(params)
    assert kernel.shape == (size or 5,)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_gate_listens_to_the_channels_around_it(size):
    pooled, kernel = jax.random.normal(KEY, (1, 9)), jnp.ones(size)
    jacobian = jax.jacobian(lambda x: eca_file.channel_gate(x[None], kernel)[0])(pooled[0])
    channel = np.arange(9)
    near = np.abs(channel[:, None] - channel[None, :]) <= size // 2
    np.testing.assert_array_equal(np.asarray(jacobian) != 0, near)


def test_kernel_is_not_reversed():
    pooled = jnp.zeros((1, 5)).at[0, 2].set(1.0)
    gate = eca_file.channel_gate(pooled, jnp.array([8.0, 0.0, -8.0]))
    np.testing.assert_allclose(gate[0], jax.nn.sigmoid(jnp.array([0.0, -8, 0, 8, 0])), rtol=1e-6)


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="odd size"):
        eca_net(jnp.ones((1, 2, 2, 8)), jnp.ones(4))
    with pytest.raises(ValueError, match="ties='even' must be"):
        inspect.unwrap(adaptive_size)(256, ties="even")  # users run without annotations' checks
