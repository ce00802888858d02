"""What is particular to EViT: whole images, cost, and tokens that are worth keeping."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import edit
from attnjax.softmax import multi_head_attention as mha
from attnjax.token_reduction import evit

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


def test_kept_and_fused_by_hand():
    x = jnp.arange(5.0)[None, :, None] * jnp.ones((1, 1, 2))
    row = jnp.array([[0.1, 0.2, 0.4, 0.05, 0.25]])
    y = evit.evit(x, row, keep_rate=0.5)
    chex.assert_trees_all_close(y[0, :, 0], jnp.array([0.0, 2.0, 4.0, 1 * 0.2 + 3 * 0.05]))
    assert evit.evit(x, row, keep_rate=0.5, others="drop").shape == (1, 3, 2)


def test_order_of_patches_does_not_matter():
    """The same tokens are kept and fused, whatever their places."""
    x, row = evit.SPEC.example(KEY, 10).values()
    order = jnp.concatenate([jnp.zeros(1, int), 1 + jax.random.permutation(KEY, 9)])
    y, permuted = evit.evit(x, row), evit.evit(x[:, order], row[:, order])
    by_size = lambda y: jnp.sort(y[:, 1:-1], axis=1)
    chex.assert_trees_all_equal(by_size(y), by_size(permuted))
    chex.assert_trees_all_close(y[:, -1], permuted[:, -1], rtol=1e-5, atol=1e-6)


def test_row_is_read_off_a_model():
    model, x = mha.MultiHeadAttention(4, 8), jax.random.normal(KEY, (2, 9, 16))
    params = model.init(KEY, x)
    y, maps = edit.read(model.apply)(params, x)
    row = evit.class_row(maps["attend"])
    chex.assert_trees_all_close(row.sum(-1), jnp.ones(2), rtol=1e-6)
    assert evit.evit(x + y, row).shape == (2, evit.tokens_after(9), 16)


def test_attended_tokens_are_worth_more_than_random_ones():
    """Images of which 4 of 16 patches show the class, told by the nearest class mean."""
    keys = jax.random.split(KEY, 6)
    label = jax.random.randint(keys[0], (256,), 0, 4)
    classes = jax.random.normal(keys[1], (4, 32))
    shown = jax.random.permutation(
        keys[2], jnp.tile(jnp.arange(16) < 4, (256, 1)), 1, independent=True
    )
    noise = jax.random.normal(keys[3], (256, 16, 32))
    patches = jnp.where(shown[..., None], classes[label][:, None], 0) + 2 * noise
    x = jnp.concatenate([jnp.zeros((256, 1, 32)), patches], 1)
    attends = 2.0 * shown + jax.random.normal(keys[4], shown.shape)
    at_random = jax.random.normal(keys[5], shown.shape)
    guess = lambda y: (y[:, 1:].sum(1) @ classes.T - (classes**2).sum(1)[None] * 2).argmax(1)

    def accuracy(scores, **options):
        row = jnp.pad(jax.nn.softmax(scores), ((0, 0), (1, 0)))
        return (guess(evit.evit(x, row, **options)) == label).mean()

    by_attention = accuracy(attends, keep_rate=0.5)
    by_chance = accuracy(at_random, keep_rate=0.5, others="drop")
    assert by_attention > by_chance + 0.1


def test_training_warms_up_from_all_tokens():
    rates = [evit.warm_up(p, keep_rate=0.6) for p in (0.0, 0.5, 1.0, 2.0)]
    assert rates == pytest.approx([1.0, 0.8, 0.6, 0.6])


def test_wrong_rate_raises():
    x, row = evit.SPEC.example(KEY, 4).values()
    for keep_rate in (0.0, 1.5):
        with pytest.raises(ValueError, match="keep_rate=.* must be in"):
            evit.evit(x, row, keep_rate=keep_rate)
