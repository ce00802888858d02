"""The polynomial that FAST has in the place of exp, and the moments that hold its keys."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks
from attnjax.linear_recurrent import fast_attention as lib
from tests import cost
from tests.cotangents import like

KEY = jax.random.key(0)
T, N, H = 48, 2, 8
CAUSAL = dict(mask=masks.Causal())


def draw():
    return np.random.default_rng(0).normal(size=(3, 2, T, N, H)).astype(np.float32)


def products(q, k):
    """Of standardised queries and keys."""
    hat = lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    return np.einsum("BTNH,BSNH->BNTS", hat(q), hat(k))


@functools.cache
def weights(**options):
    run = jax.jit(lambda *qkv: edit.matrix(lib.fast_attention, *qkv, **options))
    return jax.device_get(run(*draw()))


@pytest.mark.parametrize("order", [1, 2])
def test_features_factorise_the_polynomial(order):
    q, k, _ = draw()
    phi = jax.jit(functools.partial(lib.phi, order=order, scale=0.1))
    left, right = jax.device_get((phi(q), phi(k)))
    assert left.shape[-1] == {1: 9, 2: 45}[order]
    z = 0.1 * products(q, k)
    expected = 1 + z + (order - 1) * z**2 / 2
    actual = np.einsum("BTNF,BSNF->BNTS", left, right)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [None, masks.Causal()], ids=["all", "causal"])
def test_all_visible_weights_are_positive(mask):
    """At scale 1, where products reach H, too: f of order 2 is at least 1/2."""
    seen = np.tri(T, dtype=bool) if mask else np.ones((T, T), bool)
    for options in (dict(order=1), dict(order=2), dict(order=2, scale=1.0)):
        w = weights(mask=mask, **options)
        assert (w[..., seen] > 0).all() and not w[..., ~seen].any()
        chex.assert_trees_all_close(w.sum(-1), np.ones((2, N, T), np.float32), rtol=1e-4)


def test_order_two_is_nearer_to_softmax():
    q, k, _ = draw()

    def distance(order, scale):
        e = np.exp(scale * products(q, k))
        w = weights(mask=None, order=order, **({} if scale == 1 / H else dict(scale=scale)))
        return abs(w - e / e.sum(-1, keepdims=True)).sum(-1).mean()

    first, second = (distance(order, 1 / H) for order in (1, 2))
    assert 4 * second < first
    # the error of f is of order z^2 or z^3
    for order, error in ((1, first), (2, second)):
        assert 2**order < error / distance(order, 0.5 / H) < 2 ** (order + 2)


def test_order_two_has_the_rank_of_products_of_features():
    """Standardised features have a degree of freedom less, and squares that sum to a constant."""
    for order, rank in ((1, 1 + 7), (2, 1 + 7 + 7 * 8 // 2 - 1)):
        singular = np.linalg.svd(weights(mask=None, order=order), compute_uv=False)
        assert ((singular > 1e-5 * singular[..., :1]).sum(-1) == rank).all()


@functools.cache
def outputs():
    """Of one program: with all visible, the gradients of queries, and causal."""

    def run(q, k, v):
        every = lambda q: lib.fast_attention(q, k, v)
        o, pull = jax.vjp(every, q)
        return (o, *pull(jnp.ones_like(o))), lib.fast_attention(q, k, v, **CAUSAL)

    program = jax.jit(run)
    return lambda *args: jax.device_get(program(*args))


def test_knows_neither_the_mean_nor_the_size_of_a_token():
    q, k, v = draw()
    (actual, _), causal = outputs()(3 * q + 1, 5 * k - 2, v)
    (expected, _), expected_causal = outputs()(q, k, v)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(causal, expected_causal, rtol=1e-4, atol=1e-4)


def test_tokens_of_equal_features_see_and_are_seen_evenly():
    q, k, v = draw()
    mean = np.broadcast_to(v.mean(1, keepdims=True), v.shape)
    for flat in ((np.ones_like(q), k), (q, np.zeros_like(k))):
        (o, grads), _ = outputs()(*flat, v)
        chex.assert_trees_all_close(o, mean, rtol=1e-5, atol=1e-5)
        assert np.isfinite(grads).all()


def test_moments_are_the_state():
    """Sums of 1, k^ and products of two features, each with the values and with ones."""
    args = dict(zip("qkv", draw(), strict=True))

    @jax.jit
    def run(args, start):
        options = dict(**CAUSAL, return_state=True)
        _, state = lib.fast_attention(**args, **options)
        _, more = lib.fast_attention(**args, **options, initial_state=start)
        return state, more, lib.SPEC.carry(**args, **CAUSAL)

    start = np.ones((2, N, 45, H + 1), np.float32)
    state, more, carry = jax.device_get(run(args, start))
    assert state.shape == (2, N, 1 + H + H * (H + 1) // 2, H + 1)
    chex.assert_trees_all_close(state[:, :, 0, :-1], args["v"].sum(1), rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(state[:, :, 0, -1], np.full((2, N), T, np.float32))
    chex.assert_trees_all_close(more - state, carry * start, rtol=1e-4, atol=1e-4)


def test_a_token_costs_the_same_after_any_length():
    run = functools.partial(lib.fast_attention, **CAUSAL)
    shapes = lambda T: [jax.ShapeDtypeStruct((1, T, N, H), jnp.float32)] * 3
    for measure in (cost.operations, cost.largest_array):
        short, long = (measure(run, *shapes(T)) / T for T in (1024, 8192))
        assert long <= 1.01 * short


@pytest.mark.parametrize("options", [dict(order=1), dict(scale=0.7)], ids=str)
def test_module_hands_its_options_on(options):
    module, x = lib.FastAttention(num_heads=N, head_dim=H, **options), draw()[0].reshape(2, T, -1)
    params = like(jax.eval_shape(module.init, KEY, x))

    @jax.jit
    def run(params, x):
        w = {name: jax.tree.leaves(leaf)[0] for name, leaf in params["params"].items()}
        heads = (jnp.einsum("BTD,DNH->BTNH", x, w[name]) for name in ("query", "key", "value"))
        o = lib.fast_attention(*heads, **options, **CAUSAL)
        whole = module.apply(params, x, **CAUSAL)
        state = module.apply(params, 2, T, method="init_state")
        _, streamed = module.apply(params, state, x, method="extend")
        return (whole, streamed), (jnp.einsum("BTNH,NHD->BTD", o, w["out"]),) * 2

    chex.assert_trees_all_close(*run(params, x), rtol=1e-4, atol=1e-5)


def test_arguments_out_of_range():
    args = [jnp.asarray(x) for x in draw()]
    with pytest.raises(ValueError, match="order=3 must be 1 or 2"):
        # users run without the annotations' checks
        inspect.unwrap(lib.fast_attention)(*args, order=3)
    with pytest.raises(ValueError, match="scale=0.2 must be above 0 and at most 0.125 for order=1"):
        jax.eval_shape(lambda: lib.fast_attention(*args, order=1, scale=0.2))
    with pytest.raises(ValueError, match="scale=0.0 must be above 0"):
        jax.eval_shape(lambda: lib.fast_attention(*args, scale=0.0))
    with pytest.raises(NotImplementedError, match="fast_attention can't honour Window"):
        jax.eval_shape(lambda: lib.fast_attention(*args, mask=masks.Window(2)))
