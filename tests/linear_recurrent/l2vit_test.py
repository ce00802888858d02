"""The bound of the normaliser, and how convolutions concentrate linear attention."""

import functools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit
from attnjax.linear_recurrent import l2vit as lib
from attnjax.ops import depthwise_conv as convolutions
from attnjax.ops import linear_attention
from tests.cotangents import like
from tests.initial import initial

KEY = jax.random.key(0)
X, Y, N, H = 6, 5, 2, 8
S = X * Y
TAU = np.array([0.5, 2.0], np.float32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw():
    return normal(3, 2, X, Y, N, H)


def flat(x):
    return x.reshape(2, S, N, H)


def divided(q, k, v):
    """Linear attention with features relu, normalised without a bound."""
    q, k = jax.nn.relu(flat(q)), jax.nn.relu(flat(k))
    return linear_attention.linear_attention(q, k, flat(v))[0]


@jax.jit
def weights(q, k, v):
    return edit.matrix(lib.l2vit, q, k, v, jnp.asarray(TAU))


def scores(q, k):
    return np.einsum("BTNH,BSNH->BNTS", *(np.maximum(flat(x), 0) for x in (q, k)))


def test_above_the_bound_it_is_linear_attention_times_the_temperature():
    @jax.jit
    def both(q, k, v, tau):
        o = flat(lib.l2vit(20 * q, 20 * k, v, tau))
        return o, tau[None, None, :, None] * divided(q, k, v)

    chex.assert_trees_all_close(*both(*draw(), TAU), rtol=1e-5, atol=1e-5)


def test_weights_are_not_negative_and_sum_to_at_most_the_temperature():
    """To less where all products together are below the bound."""
    q, k, v = 1.5 * draw()
    w, total = jax.device_get(weights(q, k, v)), scores(q, k).sum(-1)
    assert (w >= 0).all() and (total < 100).any() and (total > 100).any()
    expected = TAU[None, :, None] * np.minimum(total / 100, 1)
    chex.assert_trees_all_close(w.sum(-1), expected, rtol=1e-4)


def test_below_the_bound_products_count_as_they_are():
    q, k, v = np.float32(0.1) * draw()
    expected = TAU[None, :, None, None] * scores(q, k) / 100
    chex.assert_trees_all_close(weights(q, k, v), expected, rtol=1e-4, atol=1e-8)


def test_the_bound_keeps_gradients_small_where_features_vanish():
    """They grow as 1 / |q| without it, which is what made training unstable."""
    q, k, v = draw()
    size = lambda fn, q, *kv: jnp.abs(jax.grad(lambda q: fn(q, *kv).sum())(q)).max()
    bounded = functools.partial(lib.l2vit, temperature=jnp.asarray(TAU))
    run = jax.jit(lambda q, k, v: (size(bounded, q, k, v), size(divided, q, k, v)))
    (small, large), (same, huge) = (run(np.float32(scale) * q, k, v) for scale in (1e-2, 1e-4))
    assert huge > 50 * large and same <= 1.01 * small


def test_module_is_attention_and_the_convolutions_of_its_sum_with_the_input():
    module = lib.L2vit(num_heads=N, head_dim=H, least=5.0)
    x = normal(2, X, Y, 8)
    shapes = jax.eval_shape(module.init, KEY, x)
    params = jax.tree.map(lambda p: p / 4, jax.device_get(like(shapes)))

    @jax.jit
    def both(params, x):
        w = {name: jax.tree.leaves(leaf)[0] for name, leaf in params["params"].items()}
        assert w["first"].shape == w["second"].shape == (7, 7, 8)
        heads = (jnp.einsum("BXYD,DNH->BXYNH", x, w[name]) for name in ("query", "key", "value"))
        o = lib.l2vit(*heads, w["temperature"], least=5.0)
        a = jnp.einsum("BXYNH,NHD->BXYD", o, w["out"])
        normed = nn.LayerNorm().apply(dict(params=params["params"]["norm"]), x + a)
        hidden = jax.nn.gelu(convolutions.depthwise_conv(normed, w["first"][None]))
        expected = a + convolutions.depthwise_conv(hidden, w["second"][None])
        (begin,) = jax.tree.leaves(module.init(KEY, x)["params"]["temperature"])
        return (module.apply(params, x), begin), (expected, jnp.full((N,), H**-0.5))

    chex.assert_trees_all_close(*both(params, x), rtol=1e-4, atol=1e-5)


def test_a_kernel_reaches_its_neighbourhood_and_each_channel_is_alone():
    x, ones = np.zeros((1, 9, 9, 2), np.float32), np.ones((3, 3, 2), np.float32)
    x[0, 4, 4, 0] = 1.0
    y = jax.device_get(jax.jit(lib.local_concentration)(x, ones, ones))
    reached = np.zeros((9, 9), bool)
    reached[2:7, 2:7] = True
    np.testing.assert_array_equal(y[0, ..., 0] != 0, reached)
    assert not y[..., 1].any()


def test_convolutions_concentrate_the_map_from_inputs_to_outputs():
    """The headline's reason, before any training: the Jacobian has less entropy than without."""
    module, side, D = lib.L2vit(num_heads=N, head_dim=H, size=3), 9, 4
    x = jnp.asarray(normal(1, side, side, D))
    params = jax.device_get(initial(module.init, KEY, x))["params"]
    off = params | dict(second=jax.tree.map(np.zeros_like, params["second"]))

    @jax.jit
    def jacobian(params, x):
        return jax.jacrev(lambda x: module.apply(dict(params=params), x))(x)

    def entropy(params):
        full = jax.device_get(jacobian(params, x)).reshape(side**2, D, side**2, D)
        size = np.sqrt((full**2).sum((1, 3)))
        w = size / size.sum(-1, keepdims=True)
        return -(w * np.log(w + 1e-12)).sum(-1).mean()

    spread, focused = entropy(off), entropy(params)
    assert spread > 0.8 * math.log(side**2) and focused < spread - 0.5, (spread, focused)


def test_refuses_a_bound_that_bounds_nothing():
    with pytest.raises(ValueError, match="least=0.0 must be above 0"):
        jax.eval_shape(functools.partial(lib.l2vit, least=0.0), *draw(), TAU)
