"""Only what is particular to Gated DeltaNet; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import masks
from attnjax.linear_recurrent import delta_net
from attnjax.linear_recurrent import gated_delta_net as lib
from attnjax.linear_recurrent import lightning_attention_2 as lightning
from tests.cotangents import like

KEY = jax.random.key(0)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def example(T):
    """As that of the record, by numpy."""
    q, k, v = draw(3, 2, T, 4, 8)
    beta, decay = np.random.default_rng(1).uniform(size=(2, 2, T, 4)).astype(np.float32)
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    return dict(q=q, k=k, v=v, beta=beta, log_decay=-decay)


def test_without_decay_it_is_delta_net():
    args = example(70)
    args["log_decay"] = 0 * args["log_decay"]

    @jax.jit
    def both(args):
        ungated = {name: args[name] for name in ("q", "k", "v", "beta")}
        expected = delta_net.delta_net(**ungated, return_state=True)
        return lib.gated_delta_net(**args, return_state=True), expected

    chex.assert_trees_all_close(*both(args), rtol=1e-4, atol=1e-5)


def test_under_orthogonal_keys_it_is_linear_attention_with_decay():
    """Mamba-2's sum: nothing is found under a new key, so nothing is erased."""
    basis = np.linalg.qr(draw(8, 8, seed=9))[0]
    q, v = draw(2, 1, 8, 2, 8)
    k = np.broadcast_to(basis[None, :, None], q.shape)
    beta = np.linspace(0.1, 0.9, 16, dtype=np.float32).reshape(1, 8, 2)

    @jax.jit
    def both(q, k, v, beta, fade):
        log_decay = jnp.broadcast_to(fade[None, None], beta.shape)
        expected = lightning.lightning_attention_2(q, k, v * beta[..., None], fade)
        return lib.gated_delta_net(q, k, v, beta, log_decay), expected

    fade = np.array([-0.1, -0.5], np.float32)
    chex.assert_trees_all_close(*both(q, k, v, beta, fade), rtol=1e-4, atol=1e-5)


def test_one_token_clears_the_memory_and_one_replaces_an_entry():
    """The headline: the decay does at once what erasing key by key can't, and the reverse."""
    k = np.eye(4, dtype=np.float32)[[0, 1, 2, 1]][None, :, None]
    v = draw(1, 4, 1, 3)

    @jax.jit
    def stored(log_decay, k, v):
        beta = jnp.ones_like(log_decay)
        return lib.gated_delta_net(k, k, v, beta, log_decay, return_state=True)[1][0, 0]

    none = np.zeros((1, 4, 1), np.float32)
    closed, cleared = none.copy(), np.zeros((4, 3), np.float32)
    closed[:, 3], cleared[1] = -30.0, v[0, 3, 0]
    replaced = np.stack([v[0, 0, 0], v[0, 3, 0], v[0, 2, 0], np.zeros(3, np.float32)])
    chex.assert_trees_all_close(stored(none, k, v), replaced, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(stored(closed, k, v), cleared, rtol=1e-5, atol=1e-6)


def test_a_decay_to_zero_is_the_begin_of_a_document():
    args = example(30)
    cleared = args | dict(log_decay=args["log_decay"].copy())
    cleared["log_decay"][:, 11] = -30.0

    @jax.jit
    def both(args, cleared, ids):
        expected = lib.gated_delta_net(**args, mask=masks.Segments(ids))
        return lib.gated_delta_net(**cleared), expected

    ids = np.broadcast_to((np.arange(30) >= 11)[None], (2, 30)).astype(np.int32)
    chex.assert_trees_all_close(*both(args, cleared, ids), rtol=1e-5, atol=1e-5)


def test_rates_begin_as_in_mamba_2():
    module = lib.GatedDeltaNet(num_heads=64, head_dim=2)

    @jax.jit
    def begin():
        w = module.init(KEY, jnp.zeros((1, 1, 4)))["params"]
        log_rate, bias = w["log_rate"]["table"], w["decay_bias"]["table"]
        rates = jnp.exp(log_rate), jax.nn.softplus(bias)
        return lib.log_decays(jnp.zeros((1, 1, 64)), log_rate, bias), *rates

    log_decay, rate, step = jax.device_get(begin())
    chex.assert_trees_all_close(log_decay, -(rate * step)[None, None])
    assert 1 <= rate.min() < 3 and 13 < rate.max() <= 16
    assert 9.9e-4 < step.min() < 2e-3 and 5e-2 < step.max() < 0.1001


def test_module_gates_a_normed_memory():
    module = lib.GatedDeltaNet(num_heads=2, head_dim=4, value_dim=6, conv_width=1)
    x = draw(1, 5, 8)
    params = like(jax.eval_shape(module.init, KEY, x))

    @jax.jit
    def both(params, x):
        w = params["params"]
        row = lambda a: a[None, None]

        def project(name):
            y = jnp.einsum("BTD,DNH->BTNH", x, w[name]["project"]["heads"]["kernel"])
            return jax.nn.silu(y * w[name]["conv"]["kernel"]["table"][None])

        unit = lambda x: x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)
        q, k, v = unit(project("query")), unit(project("key")), project("value")
        step = x @ w["decay"]["dense"]["kernel"] + row(w["decay_bias"]["table"])
        log_decay = -row(jnp.exp(w["log_rate"]["table"])) * jax.nn.softplus(step)
        beta = jax.nn.sigmoid(x @ w["beta"]["dense"]["kernel"])
        o = lib.gated_delta_net(q, k, v, beta, log_decay)
        gate = jnp.einsum("BTD,DNH->BTNH", x, w["gate"]["heads"]["kernel"])
        o = o / jnp.sqrt((o**2).mean(-1, keepdims=True) + 1e-6) * row(w["norm"]["scale"])[None]
        o = o * jax.nn.silu(gate)
        return module.apply(params, x), jnp.einsum("BTNV,NVD->BTD", o, w["out"]["merge"]["kernel"])

    chex.assert_trees_all_close(*both(params, x), rtol=1e-4, atol=1e-5)
