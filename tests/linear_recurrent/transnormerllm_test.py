"""Only what is particular to TransNormerLLM; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit
from attnjax.linear_recurrent import lightning_attention_2 as lightning
from attnjax.linear_recurrent import transnormerllm as lib
from tests.cotangents import like

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_without_angles_it_is_lightning_attention():
    q, k, v = normal(3, 2, 40, 4, 8)
    log_decay = -np.array([0.001, 0.05, 0.3, 1.0], np.float32)

    @jax.jit
    def both(args):
        expected = lightning.lightning_attention_2(**args, return_state=True)
        return lib.transnormerllm(**args, return_state=True), expected

    chex.assert_trees_all_close(*both(dict(q=q, k=k, v=v, log_decay=log_decay)), rtol=1e-6)


def test_weights_turn_and_fade_with_distance_alone():
    """LRPE-d: weights of equal vectors are sums of cosines, the same along each diagonal."""

    @jax.jit
    def weights(v):
        args = lib.SPEC.example(KEY, 30) | dict(q=jnp.ones_like(v), k=jnp.ones_like(v))
        return edit.matrix(lib.transnormerllm, **args), lib.angles(4, 8), args["log_decay"]

    w, angles, log_decay = jax.device_get(weights(normal(2, 30, 4, 8)))
    for lag in (0, 1, 11):
        turn = np.cos(lag * angles).sum(-1)
        expected = np.exp(log_decay * lag) * turn
        expected = np.broadcast_to(expected[None, :, None], (2, 4, 30 - lag))
        chex.assert_trees_all_close(np.diagonal(w, -lag, 2, 3), expected, rtol=1e-4, atol=1e-5)


def test_a_long_sequence_does_not_overflow():
    """Robust inference: powers of 1 / lambda, that a naive split needs, are infinite here."""
    T, lam = 4096, 0.5
    q, k, v = normal(3, 1, T, 1, 2)
    assert np.log(np.finfo(np.float32).max) < -np.log(lam) * T

    @jax.jit
    def both(q, k, v):
        log_decay = jnp.log(jnp.array([lam]))
        o, state = lib.transnormerllm(q, k, v, log_decay, return_state=True)
        step = lambda state, x: (lam * state + jnp.outer(x[1], x[2]),) * 2
        qkv = tuple(x[0, :, 0] for x in (q, k, v))
        final, states = jax.lax.scan(step, jnp.zeros((2, 2)), qkv)
        return (o[0, :, 0], state[0, 0]), (jnp.einsum("TH,THV->TV", qkv[0], states), final)

    chex.assert_trees_all_close(*both(q, k, v), rtol=1e-4, atol=1e-5)


def test_heads_and_layers_forget_by_their_number():
    decays = lambda layer: lib.log_decays(4, layer=layer, num_layers=10)
    first, last = jax.device_get(jax.jit(lambda: (decays(0), decays(9)))())
    chex.assert_trees_all_close(first, np.float32([0.0, -2.0, -4.0, -6.0]))
    chex.assert_trees_all_close(last, first / 10, rtol=1e-6)
    with pytest.raises(ValueError, match="layer=10 must be at least 0 and below num_layers=10"):
        decays(10)


@pytest.mark.parametrize("layer", [0, 2])
def test_module_norms_over_all_heads_gates_and_streams(layer):
    """The first layer turns, by angles that it learns; the others have none."""
    module = lib.TransNormerLLM(num_heads=2, head_dim=4, layer=layer, num_layers=3)
    x = normal(1, 6, 8)
    params = like(jax.eval_shape(module.init, KEY, x))
    params = jax.tree.map(lambda p: p / 3, jax.device_get(params))
    assert ("theta" in params["params"]) == (layer == 0)

    @jax.jit
    def run(params, x):
        w = params["params"]
        heads = lambda name: jnp.einsum("BTD,DNH->BTNH", x, w[name]["heads"]["kernel"])
        q, k = jax.nn.silu(heads("query")), jax.nn.silu(heads("key"))
        angle = None
        if layer == 0:
            angle = jnp.arange(6)[None, :, None, None] * w["theta"]["table"][None, None]
        log_decay = lib.log_decays(2, layer=layer, num_layers=3)
        o = lib.transnormerllm(q, k, heads("value"), log_decay, angle)
        o = o / jnp.sqrt((o**2).mean((-2, -1), keepdims=True) + 1e-6)
        expected = jnp.einsum("BTNV,NVD->BTD", o * heads("gate"), w["out"]["merge"]["kernel"])
        whole = module.apply(params, x)
        if layer == 0:
            return whole, expected
        state = module.apply(params, 1, 6, method="init_state")
        assert state.memory.shape == (1, 2, 4, 4)
        state, first = module.apply(params, state, x[:, :4], method="extend")
        _, second = module.apply(params, state, x[:, 4:], method="extend")
        return (whole, jnp.concatenate([first, second], 1)), (expected, expected)

    chex.assert_trees_all_close(*run(params, x), rtol=1e-4, atol=1e-5)
