"""Only what is particular to TAP and ADL; the rest is tests/conformance_test.py."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, registry
from attnjax.softmax import tap_adl as lib
from tests import training

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 6, 5, 8))


def chosen(i, count=3):
    return jnp.broadcast_to(100.0 * jax.nn.one_hot(i, count), (*X.shape[:3], count))


def test_one_pool_or_the_first_alone_is_the_identity():
    chex.assert_trees_all_equal(lib.tap_adl(X, jnp.zeros((2, 6, 5, 1))), X)
    chex.assert_trees_all_close(lib.tap_adl(X, chosen(0)), X, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_pool_alone_is_average_pooling_with_steps(steps):
    """Of Flax, with the window spread out by zeros."""
    z = lib.tap_adl(X, chosen(steps))
    side = 2 * steps + 1
    kernel = jnp.zeros((side, side, 1, 8)).at[::steps, ::steps].set(1 / 9)
    conv = nn.Conv(8, (side, side), padding="SAME", use_bias=False, feature_group_count=8)
    expected = conv.apply({"params": {"kernel": kernel}}, X)
    chex.assert_trees_all_close(z, expected, rtol=1e-5, atol=1e-6)
    if steps == 1:
        pooled = nn.avg_pool(X, (3, 3), padding="SAME")
        chex.assert_trees_all_close(z, pooled, rtol=1e-5, atol=1e-6)


def test_each_token_chooses_its_own_pool():
    mixed = jnp.where((jnp.arange(5) < 2)[None, None, :, None], chosen(1), chosen(2))
    z = lib.tap_adl(X, mixed)
    near, far = (lib.tap_adl(X, chosen(i)) for i in (1, 2))
    chex.assert_trees_all_close(z, jnp.concatenate([near[:, :, :2], far[:, :, 2:]], 2), rtol=1e-6)


def test_the_module_is_attention_to_normed_pools():
    module = lib.TapAdl(num_heads=2, head_dim=4, num_pools=3)
    params = jax.jit(module.init)(KEY, X)["params"]
    conv = nn.Conv(3, (3, 3), use_bias=False)
    logits = X
    for name in ("scales_in", "scales_out"):
        logits = conv.apply({"params": params[name]["conv"]}, logits)
    z = nn.LayerNorm().apply({"params": params["norm"]}, lib.tap_adl(X, logits))
    plain = registry.get("multi_head_attention").module(num_heads=2, head_dim=4)
    expected = plain.apply({"params": params["attention"]}, z.reshape(2, 30, 8))
    y = module.apply({"params": params}, X)
    chex.assert_trees_all_close(y.reshape(2, 30, 8), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="num_pools=1 must be at least 2"):
        lib.TapAdl(2, 4, num_pools=1).init(KEY, X)


# ---- the loss ----


def test_loss_of_queries_that_look_alike_is_one_and_of_those_that_do_not_is_small():
    alike = jnp.broadcast_to(jax.nn.softmax(jnp.arange(9.0)), (2, 3, 9, 9))
    apart = jnp.broadcast_to(jnp.eye(9), (2, 3, 9, 9))
    chex.assert_trees_all_close(lib.diversification_loss(alike, threshold=0.0), 1.0, rtol=1e-6)
    loss = lib.diversification_loss(apart, threshold=0.0)
    chex.assert_trees_all_close(loss, 1 / 3.0, rtol=1e-6)  # 1 / sqrt(9)
    assert lib.diversification_loss(apart) == 0  # the mean row is uniform, and cut
    chex.assert_trees_all_close(lib.diversification_loss(alike), 1.0, rtol=1e-6)


def test_loss_is_of_the_mean_over_heads_and_of_keys_above_the_threshold():
    heads = jax.nn.softmax(3 * jax.random.normal(KEY, (1, 4, 6, 8)).at[..., :2].add(0.5))
    a = np.asarray(heads[0].mean(0))
    mean = a.mean(0)
    a, mean = a * (a > 1.5 / 8), mean * (mean > 1.5 / 8)
    assert (a == 0).any() and (mean == 0).any() and mean.any()
    cosines = [x @ mean / np.linalg.norm(x) / np.linalg.norm(mean) for x in a]
    actual = lib.diversification_loss(heads, threshold=1.5)
    chex.assert_trees_all_close(actual, np.float32(np.mean(cosines)), rtol=1e-5)


def test_loss_has_a_gradient_where_nothing_passes_the_threshold():
    uniform = jnp.full((1, 2, 4, 4), 0.25)
    value, grad = jax.value_and_grad(lib.diversification_loss)(uniform)
    assert value == 0 and jnp.isfinite(grad).all()


def test_training_with_the_loss_spreads_attention():
    """The headline, in small: maps of queries that look at one token come apart."""
    module = lib.TapAdl(num_heads=2, head_dim=4, num_pools=2)
    images = jax.random.normal(KEY, (4, 4, 4, 8)).at[:, 0, 0].add(3.0)  # a token like no other
    start = jax.jit(module.init)(KEY, images)
    start = jax.tree.map_with_path(  # attention is peaked
        lambda path, x: 4 * x if "query" in str(path) else x, start
    )
    reading = edit.read(module.apply, where="attention/attend")

    def loss(params, key, weight):
        y, maps = reading(params, images)
        (a,) = maps.values()
        return ((y - images) ** 2).mean() + weight * lib.diversification_loss(a)

    def likeness(params):
        (a,) = reading(params, images)[1].values()
        a = a.mean(1)
        a = a / jnp.linalg.norm(a, axis=-1, keepdims=True)
        return (a @ a.mT).mean()

    fit = lambda weight: training.fit(
        lambda params, key: loss(params, key, weight), start, steps=150, learning_rate=1e-2
    )
    plain, spread = (jax.jit(likeness)(fit(weight)) for weight in (0.0, 1.0))
    assert spread < plain - 0.1
