"""Only what is particular to TransNormerLLM; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import edit
from attnjax.linear_recurrent import lightning_attention_2 as lightning
from attnjax.linear_recurrent import transnormerllm as lib

KEY = jax.random.key(0)


def test_without_angles_it_is_lightning_attention():
    args = lib.SPEC.example(KEY, 40)
    del args["angle"]
    expected = lightning.lightning_attention_2(**args, return_state=True)
    actual = lib.transnormerllm(**args, return_state=True)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


def test_weights_turn_and_fade_with_distance_alone():
    """LRPE-d: weights of equal vectors are sums of cosines, the same along each diagonal."""
    args = lib.SPEC.example(KEY, 30)
    args |= dict(q=jnp.ones_like(args["q"]), k=jnp.ones_like(args["k"]))
    w = edit.matrix(lib.transnormerllm, **args)
    for lag in (0, 1, 11):
        turn = jnp.cos(lag * lib.angles(4, 8)).sum(-1)
        expected = jnp.exp(args["log_decay"] * lag) * turn
        expected = jnp.broadcast_to(expected[None, :, None], (2, 4, 30 - lag))
        chex.assert_trees_all_close(jnp.diagonal(w, -lag, 2, 3), expected, rtol=1e-4, atol=1e-5)


def test_a_long_sequence_does_not_overflow():
    """Robust inference: powers of 1 / lambda, that a naive split needs, are infinite here."""
    T, lam = 4096, 0.5
    q, k, v = jax.random.normal(KEY, (3, 1, T, 1, 2))
    log_decay = jnp.log(jnp.array([lam]))
    naive = jnp.cumsum(jnp.exp(-log_decay[0] * jnp.arange(T))[:, None] * k[0, :, 0], 0)
    assert not jnp.isfinite(naive).all()
    o, state = jax.jit(lambda: lib.transnormerllm(q, k, v, log_decay, return_state=True))()
    step = lambda state, x: (lam * state + jnp.outer(x[1], x[2]),) * 2
    qkv = tuple(x[0, :, 0] for x in (q, k, v))
    final, states = jax.lax.scan(step, jnp.zeros((2, 2)), qkv)
    expected = jnp.einsum("TH,THV->TV", qkv[0], states)
    chex.assert_trees_all_close((o[0, :, 0], state[0, 0]), (expected, final), rtol=1e-4, atol=1e-5)


def test_heads_and_layers_forget_by_their_number():
    first = lib.log_decays(4, layer=0, num_layers=10)
    chex.assert_trees_all_close(first, jnp.array([0.0, -2.0, -4.0, -6.0]))
    last = lib.log_decays(4, layer=9, num_layers=10)
    chex.assert_trees_all_close(last, first / 10, rtol=1e-6)
    with pytest.raises(ValueError, match="layer=10 must be at least 0 and below num_layers=10"):
        lib.log_decays(4, layer=10, num_layers=10)


@pytest.mark.parametrize("layer", [0, 2])
def test_module_norms_over_all_heads_and_gates(layer):
    """The first layer turns, by angles that it learns; the others have none."""
    module = lib.TransNormerLLM(num_heads=2, head_dim=4, layer=layer, num_layers=3)
    x = jax.random.normal(KEY, (1, 6, 8))
    params = module.init(KEY, x)
    w = params["params"]
    heads = lambda name: jnp.einsum("BTD,DNH->BTNH", x, w[name]["heads"]["kernel"])
    q, k = jax.nn.silu(heads("query")), jax.nn.silu(heads("key"))
    log_decay = lib.log_decays(2, layer=layer, num_layers=3)
    angle = None
    if layer == 0:
        angle = jnp.arange(6)[None, :, None, None] * w["theta"]["table"][None, None]
    assert ("theta" in w) == (layer == 0)
    o = lib.transnormerllm(q, k, heads("value"), log_decay, angle)
    o = o / jnp.sqrt((o**2).mean((-2, -1), keepdims=True) + 1e-6)
    expected = jnp.einsum("BTNV,NVD->BTD", o * heads("gate"), w["out"]["merge"]["kernel"])
    chex.assert_trees_all_close(module.apply(params, x), expected, rtol=1e-4, atol=1e-5)


def test_higher_layers_stream_without_angles():
    module = lib.TransNormerLLM(num_heads=2, head_dim=4, layer=1, num_layers=2)
    x = jax.random.normal(KEY, (1, 6, 8))
    params = module.init(KEY, x)
    state = module.apply(params, 1, 6, method="init_state")
    assert state.memory.shape == (1, 2, 4, 4)
    state, first = module.apply(params, state, x[:, :4], method="extend")
    _, second = module.apply(params, state, x[:, 4:], method="extend")
    y = jnp.concatenate([first, second], 1)
    chex.assert_trees_all_close(y, module.apply(params, x), rtol=1e-4, atol=1e-5)
