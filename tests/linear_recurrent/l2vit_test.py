"""The bound of the normaliser, and how convolutions concentrate linear attention."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import edit
from attnjax.linear_recurrent import l2vit as lib
from attnjax.ops import depthwise_conv as convolutions
from attnjax.ops import linear_attention

KEY = jax.random.key(0)
X, Y, N, H = 6, 5, 2, 8
S = X * Y
TAU = jnp.array([0.5, 2.0])


def draw():
    return jax.random.normal(KEY, (3, 2, X, Y, N, H))


def flat(x):
    return x.reshape(2, S, N, H)


def divided(q, k, v):
    """Linear attention with features relu, normalised without a bound."""
    q, k = jax.nn.relu(flat(q)), jax.nn.relu(flat(k))
    return linear_attention.linear_attention(q, k, flat(v))[0]


def test_above_the_bound_it_is_linear_attention_times_the_temperature():
    q, k, v = draw()
    actual = flat(lib.l2vit(10 * q, 10 * k, v, TAU))
    expected = TAU[None, None, :, None] * divided(q, k, v)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_weights_are_not_negative_and_sum_to_at_most_the_temperature():
    """To less where all products together are below the bound."""
    q, k, v = (1.5 * x for x in draw())
    w = jax.jit(lambda: edit.matrix(lib.l2vit, q, k, v, TAU))()
    total = jnp.einsum("BTNH,BSNH->BNT", *(jax.nn.relu(flat(x)) for x in (q, k)))
    assert (w >= 0).all() and (total < 100).any() and (total > 100).any()
    expected = TAU[None, :, None] * jnp.minimum(total / 100, 1)
    chex.assert_trees_all_close(w.sum(-1), expected, rtol=1e-4)


def test_below_the_bound_products_count_as_they_are():
    q, k, v = (0.1 * x for x in draw())
    scores = jnp.einsum("BTNH,BSNH->BNTS", *(jax.nn.relu(flat(x)) for x in (q, k)))
    expected = TAU[None, :, None, None] * scores / 100
    actual = jax.jit(lambda: edit.matrix(lib.l2vit, q, k, v, TAU))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-8)


def test_the_bound_keeps_gradients_small_where_features_vanish():
    """They grow as 1 / |q| without it, which is what made training unstable."""
    q, k, v = draw()
    size = lambda fn, q: jnp.abs(jax.grad(lambda q: fn(q, k, v).sum())(q)).max()
    bounded = functools.partial(lib.l2vit, temperature=TAU)
    run = jax.jit(lambda scale: (size(bounded, q * scale), size(divided, q * scale)))
    (small, large), (same, huge) = run(1e-2), run(1e-4)
    assert huge > 50 * large and same <= 1.01 * small


def test_module_is_attention_and_the_convolutions_of_its_sum_with_the_input():
    module = lib.L2vit(num_heads=N, head_dim=H, least=5.0)
    x = jax.random.normal(KEY, (2, X, Y, 8))
    params = jax.jit(module.init)(KEY, x)
    w = {name: jax.tree.leaves(leaf)[0] for name, leaf in params["params"].items()}
    assert w["first"].shape == w["second"].shape == (7, 7, 8)
    chex.assert_trees_all_close(w["temperature"], jnp.full((N,), H**-0.5))

    @jax.jit
    def expected(x):
        heads = (jnp.einsum("BXYD,DNH->BXYNH", x, w[name]) for name in ("query", "key", "value"))
        o = lib.l2vit(*heads, w["temperature"], least=5.0)
        a = jnp.einsum("BXYNH,NHD->BXYD", o, w["out"])
        normed = jax.nn.standardize(x + a, epsilon=1e-6)
        hidden = jax.nn.gelu(convolutions.depthwise_conv(normed, w["first"][None]))
        return a + convolutions.depthwise_conv(hidden, w["second"][None])

    chex.assert_trees_all_close(jax.jit(module.apply)(params, x), expected(x), rtol=1e-4, atol=1e-5)


def test_a_kernel_reaches_its_neighbourhood_and_each_channel_is_alone():
    x = jnp.zeros((1, 9, 9, 2)).at[0, 4, 4, 0].set(1.0)
    ones = jnp.ones((3, 3, 2))
    y = lib.local_concentration(x, ones, ones)
    reached = jnp.zeros((9, 9), bool).at[2:7, 2:7].set(True)
    chex.assert_trees_all_equal(y[0, ..., 0] != 0, reached)
    assert not y[..., 1].any()


def test_convolutions_concentrate_the_map_from_inputs_to_outputs():
    """The headline's reason, before any training: the Jacobian has less entropy than without."""
    module, side, D = lib.L2vit(num_heads=N, head_dim=H, size=3), 9, 4
    x = jax.random.normal(KEY, (1, side, side, D))
    params = module.init(KEY, x)["params"]
    off = params | dict(second=jax.tree.map(jnp.zeros_like, params["second"]))

    @jax.jit
    def entropy(params):
        jacobian = jax.jacrev(lambda x: module.apply(dict(params=params), x))(x)
        size = jnp.sqrt((jacobian.reshape(side**2, D, side**2, D) ** 2).sum((1, 3)))
        w = size / size.sum(-1, keepdims=True)
        return -(w * jnp.log(w + 1e-12)).sum(-1).mean()

    spread, focused = entropy(off), entropy(params)
    assert spread > 0.8 * math.log(side**2) and focused < spread - 0.5, (spread, focused)


def test_refuses_a_bound_that_bounds_nothing():
    with pytest.raises(ValueError, match="least=0.0 must be above 0"):
        lib.l2vit(*draw(), TAU, least=0.0)
