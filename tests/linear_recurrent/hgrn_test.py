"""Only what is particular to HGRN; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.linear_recurrent import hgrn as lib
from tests.cotangents import like

KEY = jax.random.key(0)
run = jax.jit(lib.hgrn)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def example(T):
    """As that of the record, by numpy."""
    gate = 0.2 + 0.8 / (1 + np.exp(-2 * draw(2, T, 4, 8, seed=1)))
    theta = (10_000.0 ** (-np.arange(32) / 16)).astype(np.float32).reshape(4, 8)
    return dict(v=draw(2, T, 4, 16), log_forget=np.log(gate), theta=theta)


def test_an_input_turns_and_fades():
    """f^t (1 - f) e^(i t theta): the answer to a single 1, of heads that turn and that don't."""
    args = example(300)  # of the size used below
    t, f, theta = np.arange(200), np.tile([0.9, 0.99], 4), args["theta"].astype(float)
    f, theta[:, 0] = f.astype(np.float32), [0.3, 0.1, 0.02, 0.0]
    v, log_forget = np.zeros((2, 300, 4, 16), np.float32), np.zeros((2, 300, 4, 8), np.float32)
    v[:, 0, :, :8], log_forget[:] = 1.0, np.log(f)
    size = (1 - f) * f.astype(float) ** t[:, None, None]
    turn = t[:, None, None] * theta
    expected = np.concatenate([size * np.cos(turn), size * np.sin(turn)], -1).astype(np.float32)
    actual = jax.device_get(run(v, log_forget, theta.astype(np.float32)))[0, :200]
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-8)  # 200 rounded factors


def test_without_angles_it_is_an_average_of_the_past():
    args = example(300)
    args |= dict(theta=0 * args["theta"], v=np.full_like(args["v"], 3.0))
    forgotten = np.exp(np.cumsum(args["log_forget"], 1))
    expected = 3 * (1 - np.concatenate([forgotten, forgotten], -1))
    chex.assert_trees_all_close(run(**args), expected, rtol=1e-4, atol=1e-5)


def test_never_grows_beyond_its_inputs():
    args = example(300)
    size = lambda x: np.hypot(*np.split(x, 2, -1))
    assert size(jax.device_get(run(**args))).max() <= size(args["v"]).max()


def test_higher_layers_forget_more_slowly():
    """The headline: the same projections, and memories that are longer with each layer."""
    x = draw(1, 20, 8)
    params = like(jax.eval_shape(lib.HGRN(num_heads=2, head_dim=4).init, KEY, x))
    given = []

    def spy(v, log_forget, theta, **options):
        given.append(jnp.exp(log_forget))
        return v

    @jax.jit
    def gates(params, x):
        for layer in range(4):
            lib.HGRN(2, 4, layer=layer, num_layers=4, fn=spy).apply(params, x)
        kernel = params["params"]["forget"]["heads"]["kernel"]
        return given, jax.nn.sigmoid(jnp.einsum("BTD,DNH->BTNH", x, kernel))

    layers, gate = jax.device_get(gates(params, x))
    expected = [layer / 4 + (1 - layer / 4) * gate for layer in range(4)]
    chex.assert_trees_all_close(layers, expected, rtol=1e-5)
    kept = [f.min() for f in layers]
    assert kept[0] < 0.25 <= kept[1] < 0.5 <= kept[2] < 0.75 <= kept[3]


def test_module_norms_what_its_gate_lets_out():
    module = lib.HGRN(num_heads=2, head_dim=4)
    x = draw(1, 5, 8)
    params = like(jax.eval_shape(module.init, KEY, x))

    @jax.jit
    def both(params, x):
        w = params["params"]
        heads = lambda name: jnp.einsum("BTD,DNH->BTNH", x, w[name]["heads"]["kernel"])
        log_forget = jax.nn.log_sigmoid(heads("forget"))
        h = lib.hgrn(jax.nn.silu(heads("value")), log_forget, w["theta"]["table"])
        h = jax.nn.sigmoid(heads("gate")) * h
        centred = h - h.mean((-2, -1), keepdims=True)
        h = centred / jnp.sqrt((centred**2).mean((-2, -1), keepdims=True) + 1e-6)
        scale, bias = (w["norm"][name][None, None] for name in ("scale", "bias"))
        h = h * scale + bias
        return module.apply(params, x), jnp.einsum("BTNV,NVD->BTD", h, w["out"]["merge"]["kernel"])

    chex.assert_trees_all_close(*both(params, x), rtol=1e-4, atol=1e-5)


def test_angles_begin_as_a_scale_over_all_heads():
    expected = (10_000.0 ** (-np.arange(6) / 3)).reshape(2, 3).astype(np.float32)
    chex.assert_trees_all_close(jax.jit(lambda: lib.angles(2, 3))(), expected, rtol=1e-5)


def test_wrong_arguments_raise():
    args = example(3)
    with pytest.raises(ValueError, match=r"v \(2, 3, 4, 8\) must have twice as many features"):
        jax.eval_shape(lib.hgrn, args["v"][..., :8], args["log_forget"], args["theta"])
    with pytest.raises(ValueError, match="layer=4 must be at least 0 and below num_layers=4"):
        module = lib.HGRN(num_heads=2, head_dim=4, layer=4, num_layers=4)
        jax.eval_shape(module.init, KEY, draw(1, 2, 8))
