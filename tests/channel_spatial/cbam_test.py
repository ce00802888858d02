"""CBAM's gates, its parameters, and a task that pooling alone can't do."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.channel_spatial import cbam as cbam_file
from attnjax.channel_spatial.cbam import Cbam, cbam

KEY = jax.random.key(0)


def image(*shape):
    return jax.random.normal(KEY, shape)


def test_without_last_layers_a_quarter_is_left():
    x = image(2, 5, 4, 8)
    y = cbam(x, image(8, 4), jnp.zeros((4, 8)), jnp.zeros((7, 7, 2, 1)))
    chex.assert_trees_all_equal(y, x / 4)


def test_gates_are_between_zero_and_one():
    x = image(2, 5, 4, 8)
    channels = cbam_file.channel_gate(x, image(8, 4), image(4, 8))
    positions = cbam_file.position_gate(x, image(3, 3, 2, 1))
    assert channels.shape == (2, 8) and positions.shape == (2, 5, 4, 1)
    for gate in (channels, positions):
        assert (gate > 0).all() and (gate < 1).all() and gate.std() > 0.1


def test_channel_gate_knows_no_positions_and_position_gate_no_channels():
    x, down, up, kernel = image(2, 5, 4, 8), image(8, 4), image(4, 8), image(3, 3, 2, 1)
    gate = cbam_file.channel_gate
    chex.assert_trees_all_close(gate(x[:, ::-1], down, up), gate(x, down, up), rtol=1e-5)
    gate = cbam_file.position_gate
    chex.assert_trees_all_close(gate(x[..., ::-1], kernel), gate(x, kernel), rtol=1e-5)
    chex.assert_trees_all_close(gate(x[:, ::-1], kernel[::-1]), gate(x, kernel)[:, ::-1], rtol=1e-5)


def test_has_the_parameters_of_the_paper():
    params = jax.eval_shape(Cbam().init, KEY, image(1, 8, 8, 64))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 2 * 64**2 // 16 + 2 * 49


def task(key):
    """Images with a mark at one position, and the sign of a channel there to be found."""
    noise, place, sign = jax.random.split(key, 3)
    x = jax.random.normal(noise, (256, 6, 6, 4))
    mark = jax.nn.one_hot(jax.random.randint(place, (256,), 0, 36), 36).reshape(256, 6, 6)
    label = jax.random.rademacher(sign, (256,), x.dtype)
    return x + jnp.stack([2 * label[:, None, None] * mark, 6 * mark, 0 * mark, 0 * mark], -1), label


def accuracy_after_training(features, params):
    """Of a linear reading of mean features, by gradient descent on the logistic loss."""
    (x, label), (x_test, label_test) = task(KEY), task(jax.random.key(1))
    logits = lambda p, x: 10 * features(p["mixer"], x).mean((1, 2)) @ p["head"]
    loss = lambda p: jax.nn.softplus(-label * logits(p, x)).mean()
    step = lambda p, _: (jax.tree.map(lambda a, g: a - g, p, jax.grad(loss)(p)), None)
    params, _ = jax.lax.scan(step, dict(mixer=params, head=jnp.zeros(4)), length=300)
    return (logits(params, x_test) * label_test > 0).mean()


def test_finds_the_position_that_matters():
    module = Cbam(reduction=1, size=3)

    @jax.jit
    def accuracies():
        params = module.init(KEY, image(1, 6, 6, 4))
        without = accuracy_after_training(lambda _, x: x, {})
        return accuracy_after_training(module.apply, params), without

    with_gates, without = accuracies()  # about 0.9 and 0.64
    assert with_gates > 0.8 and without < 0.7


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="reduction=16 must be at most the D=8 channels"):
        Cbam().init(KEY, image(1, 4, 4, 8))
    with pytest.raises(ValueError, match="odd sides"):
        cbam(image(1, 4, 4, 8), image(8, 2), image(2, 8), image(4, 3, 2, 1))
