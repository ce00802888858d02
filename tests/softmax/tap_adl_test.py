"""Only what is particular to TAP and ADL; the rest is tests/conformance_test.py."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, registry
from attnjax.softmax import tap_adl as lib
from tests import training
from tests.cotangents import like

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(2, 6, 5, 8)
run = jax.jit(lib.tap_adl)


def chosen(i, count=3):
    return np.broadcast_to(100 * np.eye(count, dtype=np.float32)[i], (*X.shape[:3], count))


def test_one_pool_or_the_first_alone_is_the_identity():
    chex.assert_trees_all_equal(run(X, np.zeros((2, 6, 5, 1), np.float32)), X)
    chex.assert_trees_all_close(run(X, chosen(0)), X, rtol=1e-6)


def test_a_pool_alone_is_average_pooling_with_steps():
    """Of Flax, with the window spread out by zeros."""

    def pooled(x, steps):
        side = 2 * steps + 1
        kernel = jnp.zeros((side, side, 1, 8)).at[::steps, ::steps].set(1 / 9)
        conv = nn.Conv(8, (side, side), padding="SAME", use_bias=False, feature_group_count=8)
        return conv.apply({"params": {"kernel": kernel}}, x)

    reference = jax.jit(
        lambda x: (pooled(x, 1), pooled(x, 2), nn.avg_pool(x, (3, 3), padding="SAME"))
    )
    first, second, average = reference(X)
    near, far = (run(X, chosen(steps)) for steps in (1, 2))
    expected = (first, second, average)
    chex.assert_trees_all_close((near, far, near), expected, rtol=1e-5, atol=1e-6)


def test_each_token_chooses_its_own_pool():
    left = (np.arange(5) < 2)[None, None, :, None]
    z, near, far = (
        jax.device_get(run(X, choice))
        for choice in (np.where(left, chosen(1), chosen(2)), chosen(1), chosen(2))
    )
    chex.assert_trees_all_close(z, np.where(left, near, far), rtol=1e-6)


def test_the_module_is_attention_to_normed_pools():
    module = lib.TapAdl(num_heads=2, head_dim=4, num_pools=3)
    params = like(jax.eval_shape(module.init, KEY, X))["params"]
    params = jax.tree.map(lambda p: p / 4, jax.device_get(params))
    conv = nn.Conv(3, (3, 3), use_bias=False)
    plain = registry.get("multi_head_attention").module(num_heads=2, head_dim=4)

    @jax.jit
    def both(params, x):
        logits = x
        for name in ("scales_in", "scales_out"):
            logits = conv.apply({"params": params[name]["conv"]}, logits)
        z = nn.LayerNorm().apply({"params": params["norm"]}, lib.tap_adl(x, logits))
        expected = plain.apply({"params": params["attention"]}, z.reshape(2, 30, 8))
        return module.apply({"params": params}, x).reshape(2, 30, 8), expected

    chex.assert_trees_all_close(*both(params, X), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="num_pools=1 must be at least 2"):
        jax.eval_shape(lib.TapAdl(2, 4, num_pools=1).init, KEY, X)


# ---- the loss ----


@functools.cache
def program(**options):
    run = jax.jit(jax.value_and_grad(functools.partial(lib.diversification_loss, **options)))
    return lambda weights: jax.device_get(run(weights))


def loss_of(weights, **options):
    return program(**options)(weights)[0]


def test_loss_of_queries_that_look_alike_is_one_and_of_those_that_do_not_is_small():
    p = np.exp(np.arange(9, dtype=np.float32))
    alike = np.broadcast_to(p / p.sum(), (2, 3, 9, 9))
    apart = np.broadcast_to(np.eye(9, dtype=np.float32), (2, 3, 9, 9))
    one = np.float32(1)
    chex.assert_trees_all_close(loss_of(alike, threshold=0.0), one, rtol=1e-6)
    chex.assert_trees_all_close(loss_of(apart, threshold=0.0), one / 3, rtol=1e-6)  # 1 / sqrt(9)
    assert loss_of(apart) == 0  # the mean row is uniform, and cut
    chex.assert_trees_all_close(loss_of(alike), one, rtol=1e-6)


def test_loss_is_of_the_mean_over_heads_and_of_keys_above_the_threshold():
    heads = 3 * normal(1, 4, 6, 8)
    heads[..., :2] += 1.5
    heads = np.exp(heads) / np.exp(heads).sum(-1, keepdims=True)
    a = heads[0].mean(0)
    mean = a.mean(0)
    a, mean = a * (a > 1.5 / 8), mean * (mean > 1.5 / 8)
    assert (a == 0).any() and (mean == 0).any() and mean.any()
    cosines = [x @ mean / np.linalg.norm(x) / np.linalg.norm(mean) for x in a]
    actual = loss_of(heads, threshold=1.5)
    chex.assert_trees_all_close(actual, np.float32(np.mean(cosines)), rtol=1e-5)


def test_loss_has_a_gradient_where_nothing_passes_the_threshold():
    value, grad = program()(np.full((2, 3, 9, 9), 1 / 9, np.float32))
    assert value == 0 and np.isfinite(grad).all()


def test_training_with_the_loss_spreads_attention():
    """The headline, in small: maps of queries that look at one token come apart."""
    module = lib.TapAdl(num_heads=2, head_dim=4, num_pools=2)
    draw = lambda: jax.random.normal(KEY, (4, 4, 4, 8)).at[:, 0, 0].add(3.0)
    images = jax.jit(draw)()  # with a token like no other
    start = jax.jit(module.init)(KEY, images)
    start = jax.tree.map_with_path(  # attention is peaked
        lambda path, x: 4 * np.asarray(x) if "query" in str(path) else x, start
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
