"""The polynomial that FAST has in the place of exp, and the moments that hold its keys."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import edit, masks
from attnjax.linear_recurrent import fast_attention as lib
from tests import cost

KEY = jax.random.key(0)
T, N, H = 48, 2, 8


def draw():
    return jax.random.normal(KEY, (3, 2, T, N, H))


def products(q, k):
    """Of standardised queries and keys."""
    hat = lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    return jnp.einsum("BTNH,BSNH->BNTS", hat(q), hat(k))


def weights(**options):
    return jax.jit(lambda: edit.matrix(lib.fast_attention, *draw(), **options))()


@pytest.mark.parametrize("order", [1, 2])
def test_features_factorise_the_polynomial(order):
    q, k, _ = draw()
    phi = functools.partial(lib.phi, order=order, scale=0.1)
    assert phi(q).shape[-1] == {1: 9, 2: 45}[order]
    z = 0.1 * products(q, k)
    expected = 1 + z + (order - 1) * z**2 / 2
    actual = jnp.einsum("BTNF,BSNF->BNTS", phi(q), phi(k))
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [None, masks.Causal()], ids=["all", "causal"])
def test_all_visible_weights_are_positive(mask):
    """At scale 1, where products reach H, too: f of order 2 is at least 1/2."""
    for options in (dict(order=1), dict(order=2), dict(order=2, scale=1.0)):
        w = weights(mask=mask, **options)
        seen = jnp.broadcast_to(masks.dense(mask, T, T), w.shape)
        assert (w[seen] > 0).all() and not w[~seen].any()
        chex.assert_trees_all_close(w.sum(-1), jnp.ones((2, N, T)), rtol=1e-4)


def test_order_two_is_nearer_to_softmax():
    q, k, _ = draw()
    distance = lambda w, scale: abs(w - jax.nn.softmax(scale * products(q, k))).sum(-1).mean()
    first, second = (distance(weights(order=order), 1 / H) for order in (1, 2))
    assert 4 * second < first
    # the error of f is of order z^2 or z^3
    for order, error in ((1, first), (2, second)):
        half = distance(weights(order=order, scale=0.5 / H), 0.5 / H)
        assert 2**order < error / half < 2 ** (order + 2)


def test_order_two_has_the_rank_of_products_of_features():
    """Standardised features have a degree of freedom less, and squares that sum to a constant."""
    for order, rank in ((1, 1 + 7), (2, 1 + 7 + 7 * 8 // 2 - 1)):
        singular = jnp.linalg.svd(weights(order=order), compute_uv=False)
        assert ((singular > 1e-5 * singular[..., :1]).sum(-1) == rank).all()


def test_knows_neither_the_mean_nor_the_size_of_a_token():
    q, k, v = draw()
    for options in (dict(), dict(mask=masks.Causal())):
        run = functools.partial(lib.fast_attention, v=v, **options)
        chex.assert_trees_all_close(run(3 * q + 1, 5 * k - 2), run(q, k), rtol=1e-4, atol=1e-4)


def test_tokens_of_equal_features_see_and_are_seen_evenly():
    q, k, v = draw()
    mean = jnp.broadcast_to(v.mean(1, keepdims=True), v.shape)
    for flat in ((jnp.ones_like(q), k), (q, jnp.zeros_like(k))):
        chex.assert_trees_all_close(lib.fast_attention(*flat, v), mean, rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda q: lib.fast_attention(q, k, v).sum())(jnp.ones_like(q))
    assert jnp.isfinite(grads).all()


def test_moments_are_the_state():
    """Sums of 1, k^ and products of two features, each with the values and with ones."""
    args = dict(zip("qkv", draw(), strict=True))
    run = functools.partial(lib.fast_attention, mask=masks.Causal(), return_state=True)
    (_, state), (_, more) = run(**args), run(**args, initial_state=jnp.ones((2, N, 45, H + 1)))
    assert state.shape == (2, N, 1 + H + H * (H + 1) // 2, H + 1)
    chex.assert_trees_all_close(state[:, :, 0, :-1], args["v"].sum(1), rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(state[:, :, 0, -1], jnp.full((2, N), float(T)))
    carry = lib.SPEC.carry(**args, mask=masks.Causal())
    chex.assert_trees_all_close(more - state, carry * jnp.ones_like(state), rtol=1e-4, atol=1e-4)


def test_a_token_costs_the_same_after_any_length():
    run = functools.partial(lib.fast_attention, mask=masks.Causal())
    shapes = lambda T: [jax.ShapeDtypeStruct((1, T, N, H), jnp.float32)] * 3
    for measure in (cost.operations, cost.largest_array):
        short, long = (measure(run, *shapes(T)) / T for T in (1024, 8192))
        assert long <= 1.01 * short


@pytest.mark.parametrize("options", [dict(order=1), dict(scale=0.7)], ids=str)
def test_module_hands_its_options_on(options):
    module, x = lib.FastAttention(num_heads=N, head_dim=H, **options), draw()[0].reshape(2, T, -1)
    params = module.init(KEY, x)
    w = {name: jax.tree.leaves(leaf)[0] for name, leaf in params["params"].items()}
    heads = (jnp.einsum("BTD,DNH->BTNH", x, w[name]) for name in ("query", "key", "value"))
    o = lib.fast_attention(*heads, **options, mask=masks.Causal())
    expected = jnp.einsum("BTNH,NHD->BTD", o, w["out"])
    whole = module.apply(params, x, mask=masks.Causal())
    state = module.apply(params, 2, T, method="init_state")
    _, streamed = module.apply(params, state, x, method="extend")
    chex.assert_trees_all_close((whole, streamed), (expected,) * 2, rtol=1e-4, atol=1e-5)


def test_arguments_out_of_range():
    args = draw()
    with pytest.raises(ValueError, match="order=3 must be 1 or 2"):
        # users run without the annotations' checks
        inspect.unwrap(lib.fast_attention)(*args, order=3)
    with pytest.raises(ValueError, match="scale=0.2 must be above 0 and at most 0.125 for order=1"):
        lib.fast_attention(*args, order=1, scale=0.2)
    with pytest.raises(ValueError, match="scale=0.0 must be above 0"):
        lib.fast_attention(*args, scale=0.0)
    with pytest.raises(NotImplementedError, match="fast_attention can't honour Window"):
        lib.fast_attention(*args, mask=masks.Window(2))
