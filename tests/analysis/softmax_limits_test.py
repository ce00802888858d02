"""What is particular to the limits of softmax: the bounds hold and are attained."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.analysis import softmax_limits as limits
from attnjax.core import edit
from attnjax.softmax import multi_head_attention as mha

KEY = jax.random.key(0)


def random(S, D=8, B=64):
    keys = jax.random.split(KEY)
    x = jax.random.normal(keys[1], (B, S, D))
    return jax.random.normal(keys[0], (B, S)), x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def mean(name, S, **options):
    """Of one statistic; what it doesn't need isn't computed."""
    return jax.jit(lambda: limits.softmax_limits(*random(S), **options)[name].mean())()


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_bounds_hold(temperature):
    found = limits.softmax_limits(*random(20), temperature=temperature)
    assert (found["jacobian_norm"] < found["jacobian_bound"]).all()
    assert (found["max_weight"] < found["max_weight_bound"]).all()
    assert (found["distance"] < 1).all()  # tokens of length 1, weights that add up to 1


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_jacobian_bound_is_attained_by_two_equal_logits(temperature):
    logits = jnp.array([[0.0, 0.0, -100.0, -100.0]])
    found = limits.softmax_limits(logits, jnp.ones((1, 4, 2)), top=2, temperature=temperature)
    chex.assert_trees_all_close(found["jacobian_norm"], found["jacobian_bound"], rtol=1e-5)
    chex.assert_trees_all_close(found["jacobian_bound"], jnp.array([0.5 / temperature]))


def test_weight_bound_is_attained_and_falls_with_the_length():
    weights = []
    for S in (10, 100, 1000):
        logits = jnp.full((1, S), -1.0).at[0, 3].set(1.0)
        weight = jax.nn.softmax(logits).max(-1)
        chex.assert_trees_all_close(weight, limits.weight_bound(jnp.array([2.0]), S), rtol=1e-5)
        weights.append(float(weight[0]) * S)
    assert weights[0] < weights[1] < weights[2] < jnp.exp(2.0)  # never more than e^r / S


def test_more_selected_tokens_are_harder_to_tell_apart():
    share = lambda top: mean("distinguishable", 64, top=top)
    assert share(1) == 1 and share(2) < 0.9 and share(4) < 0.7 and share(16) < 0.5


def test_a_selection_is_set_apart_less_the_longer_the_sequence():
    assert mean("distance", 16) > 1.5 * mean("distance", 64)


def test_is_taken_from_a_model():
    """Logits up to a constant are the log of the weights that are read."""
    model, x = mha.MultiHeadAttention(2, 4), jax.random.normal(KEY, (2, 6, 8))
    _, maps = edit.read(model.apply)(model.init(KEY, x), x)
    w = maps["attend"]
    tokens = jnp.broadcast_to(x[:, None, None], (*w.shape, 8))
    found = limits.softmax_limits(jnp.log(w), tokens, top=2)
    assert found["mass"].shape == (2, 2, 6)
    chex.assert_trees_all_close(found["max_weight"], w.max(-1), rtol=1e-5)


def test_selecting_all_raises():
    logits, x = random(4)
    for top in (0, 4):
        with pytest.raises(ValueError, match=f"top={top} must be at least 1 and less than S=4"):
            limits.softmax_limits(logits, x, top=top)
