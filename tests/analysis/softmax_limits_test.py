"""What is particular to the limits of softmax: the bounds hold and are attained."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.analysis import softmax_limits as limits
from attnjax.core import edit
from attnjax.softmax import multi_head_attention as mha
from tests.cotangents import like

KEY = jax.random.key(0)


def random(S, D=8, B=64):
    draw = np.random.default_rng(0).normal
    logits, x = draw(size=(B, S)).astype(np.float32), draw(size=(B, S, D)).astype(np.float32)
    return logits, x / np.linalg.norm(x, axis=-1, keepdims=True)


@functools.cache
def program(**options):
    run = jax.jit(functools.partial(limits.softmax_limits, **options))
    return lambda *arrays: jax.device_get(run(*arrays))


def mean(name, S, top):
    """Of one statistic; what it doesn't need isn't computed."""
    run = jax.jit(lambda *x: limits.softmax_limits(*x, top=top)[name].mean())
    return float(run(*random(S)))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_bounds_hold(temperature):
    logits, x = random(20)
    logits = np.float32(0.7) * logits  # so that no weight is rounded to 1
    found = program(temperature=temperature)(logits, x)
    assert (found["jacobian_norm"] < found["jacobian_bound"]).all()
    assert (found["max_weight"] < found["max_weight_bound"]).all()
    assert (found["distance"] < 1).all()  # tokens of length 1, weights that add up to 1


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_jacobian_bound_is_attained_by_two_equal_logits(temperature):
    """By the program of the test above, in an image of 20 tokens."""
    logits = np.full((64, 20), -100.0, np.float32)
    logits[:, :2] = 0.0
    found = program(temperature=temperature)(logits, np.ones((64, 20, 8), np.float32))
    chex.assert_trees_all_close(found["jacobian_norm"], found["jacobian_bound"], rtol=1e-5)
    expected = np.full(64, 0.5 / temperature, np.float32)
    chex.assert_trees_all_close(found["jacobian_bound"], expected)


def test_weight_bound_is_attained_and_falls_with_the_length():
    weights = []
    for S in (10, 100, 1000):
        weight = np.exp([1.0]) / (np.exp(1.0) + (S - 1) * np.exp(-1.0))  # logits 1, -1, -1...
        bound = jax.jit(limits.weight_bound, static_argnums=1)(np.float32([2.0]), S)
        chex.assert_trees_all_close(weight.astype(np.float32), bound, rtol=1e-5)
        weights.append(float(weight[0]) * S)
    assert weights[0] < weights[1] < weights[2] < np.exp(2.0)  # never more than e^r / S


def test_more_selected_tokens_are_harder_to_tell_apart():
    share = lambda top: mean("distinguishable", 64, top)
    assert share(1) == 1 and share(2) < 0.9 and share(4) < 0.7 and share(16) < 0.5


def test_a_selection_is_set_apart_less_the_longer_the_sequence():
    assert mean("distance", 16, 4) > 1.5 * mean("distance", 64, 4)


def test_is_taken_from_a_model():
    """Logits up to a constant are the log of the weights that are read."""
    model, x = mha.MultiHeadAttention(2, 4), random(6, B=2)[1]
    params = like(jax.eval_shape(model.init, KEY, x))

    @jax.jit
    def read(params, x):
        w = edit.read(model.apply)(params, x)[1]["attend"]
        tokens = jnp.broadcast_to(x[:, None, None], (*w.shape, 8))
        return w, limits.softmax_limits(jnp.log(w), tokens, top=2)

    w, found = jax.device_get(read(params, x))
    assert found["mass"].shape == (2, 2, 6)
    chex.assert_trees_all_close(found["max_weight"], w.max(-1), rtol=1e-5)


def test_selecting_all_raises():
    for top in (0, 4):
        with pytest.raises(ValueError, match=f"top={top} must be at least 1 and less than S=4"):
            jax.eval_shape(lambda *x, top=top: limits.softmax_limits(*x, top=top), *random(4))
