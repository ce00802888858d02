"""What is particular to EViT: whole images, cost, and tokens that are worth keeping."""

import functools

import chex
import jax
import numpy as np
import pytest

from attnjax.core import edit
from attnjax.softmax import multi_head_attention as mha
from attnjax.token_reduction import evit
from tests.cotangents import like

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("keep_rate", "giga"), [(1.0, 4.6), (0.9, 4.0), (0.8, 3.5), (0.7, 3.0), (0.6, 2.6), (0.5, 2.3)]
)
def test_cost_of_deit_small_is_that_of_table_1(keep_rate, giga):
    """Multiplications of 12 layers on 224 x 224 pixels, reorganised in layers 4, 7 and 10."""
    T, D, cost = 197, 384, 196 * 768 * 384
    for layer in range(1, 13):
        cost += 4 * T * D**2 + 2 * T**2 * D
        if layer in (4, 7, 10):
            T = evit.tokens_after(T, keep_rate=keep_rate)
        cost += 8 * T * D**2
    assert round(cost / 1e9, 1) == giga


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x):
    e = np.exp(x)
    return e / e.sum(-1, keepdims=True)


def test_kept_and_fused_by_hand():
    x = np.arange(5, dtype=np.float32)[None, :, None].repeat(2, 2)
    row = np.float32([[0.1, 0.2, 0.4, 0.05, 0.25]])
    run = functools.partial(evit.evit, keep_rate=0.5)
    y = jax.device_get(jax.jit(run)(x, row))
    chex.assert_trees_all_close(y[0, :, 0], np.float32([0, 2, 4, 1 * 0.2 + 3 * 0.05]))
    assert jax.eval_shape(functools.partial(run, others="drop"), x, row).shape == (1, 3, 2)


def test_order_of_patches_does_not_matter():
    """The same tokens are kept and fused, whatever their places."""
    x, row = draw(2, 10, 8), softmax(draw(2, 10, seed=1))
    order = np.array([0, 4, 2, 9, 1, 7, 3, 8, 6, 5])
    run = jax.jit(evit.evit)
    y, permuted = jax.device_get([run(x, row), run(x[:, order], row[:, order])])
    by_size = lambda y: np.sort(y[:, 1:-1], axis=1)
    chex.assert_trees_all_equal(by_size(y), by_size(permuted))
    chex.assert_trees_all_close(y[:, -1], permuted[:, -1], rtol=1e-5, atol=1e-6)


def test_row_is_read_off_a_model():
    model, x = mha.MultiHeadAttention(4, 8), draw(2, 9, 16)
    params = like(jax.eval_shape(model.init, KEY, x))

    @jax.jit
    def run(params, x):
        y, maps = edit.read(model.apply)(params, x)
        row = evit.class_row(maps["attend"])
        return row, evit.evit(x + y, row)

    row, y = jax.device_get(run(params, x))
    chex.assert_trees_all_close(row.sum(-1), np.ones(2, np.float32), rtol=1e-6)
    assert y.shape == (2, evit.tokens_after(9), 16)


def test_attended_tokens_are_worth_more_than_random_ones():
    """Images of which 4 of 16 patches show the class, told by the nearest class mean."""
    random = np.random.default_rng(0)
    label, classes = random.integers(0, 4, 256), draw(4, 32, seed=1)
    shown = random.permuted(np.tile(np.arange(16) < 4, (256, 1)), axis=1)
    noise, (first, second) = draw(256, 16, 32, seed=2), draw(2, 256, 16, seed=3)
    patches = np.where(shown[..., None], classes[label][:, None], 0) + 2 * noise
    x = np.pad(patches, ((0, 0), (1, 0), (0, 0))).astype(np.float32)
    guess = lambda y: (y[:, 1:].sum(1) @ classes.T - (classes**2).sum(1) * 2).argmax(1)

    def accuracy(scores, **options):
        row = np.pad(softmax(scores), ((0, 0), (1, 0))).astype(np.float32)
        y = jax.jit(functools.partial(evit.evit, keep_rate=0.5, **options))(x, row)
        return (guess(jax.device_get(y)) == label).mean()

    by_attention = accuracy(2.0 * shown + first)
    by_chance = accuracy(second, others="drop")
    assert by_attention > by_chance + 0.1


def test_training_warms_up_from_all_tokens():
    rates = [evit.warm_up(p, keep_rate=0.6) for p in (0.0, 0.5, 1.0, 2.0)]
    assert rates == pytest.approx([1.0, 0.8, 0.6, 0.6])


def test_wrong_rate_raises():
    for keep_rate in (0.0, 1.5):
        with pytest.raises(ValueError, match="keep_rate=.* must be in"):
            run = functools.partial(evit.evit, keep_rate=keep_rate)
            jax.eval_shape(run, draw(2, 4, 8), draw(2, 4))
