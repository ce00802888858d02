"""Only what is particular to Gated DeltaNet; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp

from attnjax.core import masks
from attnjax.linear_recurrent import delta_net
from attnjax.linear_recurrent import gated_delta_net as lib
from attnjax.linear_recurrent import lightning_attention_2 as lightning

KEY = jax.random.key(0)


def test_without_decay_it_is_delta_net():
    args = lib.SPEC.example(KEY, 70)
    args["log_decay"] = jnp.zeros_like(args["log_decay"])
    ungated = {name: args[name] for name in ("q", "k", "v", "beta")}
    expected = delta_net.delta_net(**ungated, return_state=True)
    actual = lib.gated_delta_net(**args, return_state=True)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_under_orthogonal_keys_it_is_linear_attention_with_decay():
    """Mamba-2's sum: nothing is found under a new key, so nothing is erased."""
    basis = jnp.linalg.qr(jax.random.normal(KEY, (8, 8)))[0]
    q, v = jax.random.normal(KEY, (2, 1, 8, 2, 8))
    k = jnp.broadcast_to(basis[None, :, None], q.shape)
    beta, fade = jax.random.uniform(KEY, (1, 8, 2)), jnp.array([-0.1, -0.5])
    log_decay = jnp.broadcast_to(fade[None, None], beta.shape)
    actual = lib.gated_delta_net(q, k, v, beta, log_decay)
    expected = lightning.lightning_attention_2(q, k, v * beta[..., None], fade)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_one_token_clears_the_memory_and_one_replaces_an_entry():
    """The headline: the decay does at once what erasing key by key can't, and the reverse."""
    k = jnp.eye(4)[jnp.array([0, 1, 2, 1])][None, :, None]
    v = jax.random.normal(KEY, (1, 4, 1, 3))
    none = jnp.zeros((1, 4, 1))

    def stored(log_decay):
        _, state = lib.gated_delta_net(k, k, v, none + 1, log_decay, return_state=True)
        return state[0, 0]

    replaced = jnp.stack([v[0, 0, 0], v[0, 3, 0], v[0, 2, 0], jnp.zeros(3)])
    chex.assert_trees_all_close(stored(none), replaced, rtol=1e-5, atol=1e-6)
    cleared = jnp.zeros((4, 3)).at[1].set(v[0, 3, 0])
    chex.assert_trees_all_close(stored(none.at[:, 3].set(-30.0)), cleared, rtol=1e-5, atol=1e-6)


def test_a_decay_to_zero_is_the_begin_of_a_document():
    args = lib.SPEC.example(KEY, 30)
    cleared = args | dict(log_decay=args["log_decay"].at[:, 11].set(-30.0))
    mask = masks.Segments(jnp.broadcast_to((jnp.arange(30) >= 11)[None], (2, 30)).astype(int))
    expected = lib.gated_delta_net(**args, mask=mask)
    chex.assert_trees_all_close(lib.gated_delta_net(**cleared), expected, rtol=1e-5, atol=1e-5)


def test_rates_begin_as_in_mamba_2():
    module = lib.GatedDeltaNet(num_heads=64, head_dim=2)
    w = module.init(KEY, jnp.zeros((1, 1, 4)))["params"]
    log_rate, bias = w["log_rate"]["table"], w["decay_bias"]["table"]
    log_decay = lib.log_decays(jnp.zeros((1, 1, 64)), log_rate, bias)
    chex.assert_trees_all_close(log_decay, -(jnp.exp(log_rate) * jax.nn.softplus(bias))[None, None])
    rate, step = jnp.exp(log_rate), jax.nn.softplus(bias)
    assert 1 <= rate.min() < 3 and 13 < rate.max() <= 16
    assert 9.9e-4 < step.min() < 2e-3 and 5e-2 < step.max() < 0.1001


def test_module_gates_a_normed_memory():
    module = lib.GatedDeltaNet(num_heads=2, head_dim=4, value_dim=6, conv_width=1)
    x = jax.random.normal(KEY, (1, 5, 8))
    params = module.init(KEY, x)
    w = params["params"]

    def project(name):
        y = jnp.einsum("BTD,DNH->BTNH", x, w[name]["project"]["heads"]["kernel"])
        return jax.nn.silu(y * w[name]["conv"]["kernel"]["table"][None])

    unit = lambda x: x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)
    q, k, v = unit(project("query")), unit(project("key")), project("value")
    step = jax.nn.softplus(x @ w["decay"]["dense"]["kernel"] + w["decay_bias"]["table"][None, None])
    log_decay = -jnp.exp(w["log_rate"]["table"])[None, None] * step
    o = lib.gated_delta_net(q, k, v, jax.nn.sigmoid(x @ w["beta"]["dense"]["kernel"]), log_decay)
    gate = jnp.einsum("BTD,DNH->BTNH", x, w["gate"]["heads"]["kernel"])
    o = o / jnp.sqrt((o**2).mean(-1, keepdims=True) + 1e-6) * jax.nn.silu(gate)
    expected = jnp.einsum("BTNV,NVD->BTD", o, w["out"]["merge"]["kernel"])
    chex.assert_trees_all_close(module.apply(params, x), expected, rtol=1e-4, atol=1e-5)
