"""Only what is particular to DeltaNet; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from attnjax.linear_recurrent import delta_net as lib
from attnjax.linear_recurrent import gated_linear_attention as gla
from attnjax.ops import dot_product_attention as softmax
from tests.cotangents import like

KEY = jax.random.key(0)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def basis(size=8):
    return np.linalg.qr(draw(size, size, seed=9))[0]


def test_recalls_the_last_value_of_every_key():
    """The headline: what is stored again is replaced, where plain linear attention adds up."""
    names = np.random.default_rng(0).integers(0, 8, 100)
    assert len(np.unique(names)) == 8
    k, v = basis()[names][None, :, None], draw(1, 100, 1, 3)

    @jax.jit
    def states(k, v):
        _, replaced = lib.delta_net(k, k, v, jnp.ones((1, 100, 1)), return_state=True)
        _, added = gla.gated_linear_attention(k, k, v, jnp.zeros_like(k), return_state=True)
        return replaced[0, 0], added[0, 0]

    values = [v[0, names == i, 0] for i in range(8)]
    last, total = np.stack([x[-1] for x in values]), np.stack([x.sum(0) for x in values])
    stored = [basis() @ state for state in jax.device_get(states(k, v))]
    chex.assert_trees_all_close(stored, [last, total], rtol=1e-4, atol=1e-4)


def test_beta_is_how_much_is_replaced():
    k, v = unit(draw(1, 1, 1, 8)).repeat(2, 1), draw(1, 2, 1, 3)
    run = jax.jit(jax.vmap(lambda beta, k, v: lib.delta_net(k, k, v, beta), (0, None, None)))
    beta = np.array([0.0, 0.3, 1.0], np.float32)[:, None, None, None]
    second = np.concatenate([np.ones_like(beta), beta], 2)
    mixed = (1 - beta) * v[:, 0] + beta * v[:, 1]
    chex.assert_trees_all_close(run(second, k, v)[:, :, 1], mixed, rtol=1e-5, atol=1e-6)


def test_each_token_is_a_step_of_gradient_descent():
    def learn(state, token):
        k, v, beta = token
        loss = lambda state: ((jnp.einsum("BNHV,BNH->BNV", state, k) - v) ** 2).sum() / 2
        return state - beta[..., None, None] * jax.grad(loss)(state), None

    @jax.jit
    def both(k, v, beta):
        tokens = [x.swapaxes(0, 1) for x in (k, v, beta)]
        descended, _ = jax.lax.scan(learn, jnp.zeros((2, 4, 8, 8)), tokens)
        return lib.delta_net(k, k, v, beta, return_state=True)[1], descended

    beta = np.random.default_rng(1).uniform(size=(2, 7, 4)).astype(np.float32)
    state, expected = both(unit(draw(2, 7, 4, 8)), draw(2, 7, 4, 8, seed=1), beta)
    chex.assert_trees_all_close(state, expected, rtol=1e-4, atol=1e-5)


def test_under_orthogonal_keys_it_is_linear_attention():
    """Nothing is found under a new key, so nothing is replaced."""

    @jax.jit
    def both(q, k, v, beta):
        values = v * beta[..., None]
        sums = gla.gated_linear_attention(q, k, values, jnp.zeros_like(k))
        return lib.delta_net(q, k, v, beta), sums

    beta = np.linspace(0.1, 0.9, 8, dtype=np.float32)[None, :, None]
    q, v = draw(2, 1, 8, 1, 8)
    actual, expected = both(q, basis()[None, :, None], v, beta)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_with_beta_2_and_no_values_tokens_only_reflect():
    """A state of any length stays as large as it was: with beta <= 2 it can't grow."""
    start = draw(2, 4, 8, 8)

    @jax.jit
    def end(k, start):
        options = dict(initial_state=start, return_state=True)
        return lib.delta_net(k, k, 0 * k, jnp.full((2, 150, 4), 2.0), **options)[1]

    norm = lambda x: np.sqrt((x**2).sum((-2, -1)))
    state = jax.device_get(end(unit(draw(2, 150, 4, 8, seed=1)), start))
    chex.assert_trees_all_close(norm(state), norm(start), rtol=1e-4)


def test_full_attention_recalls_more_keys_than_a_state_has():
    """Why the study mixes in full attention: 8 key channels hold 8 values, a cache holds all."""
    k, v = unit(draw(1, 64, 1, 8)), draw(1, 64, 1, 3, seed=1)

    @jax.jit
    def recall(beta, k, v):
        _, state = lib.delta_net(k, k, v, beta, return_state=True)
        everything = softmax.dot_product_attention(k, k, v, scale=1e3)
        return jnp.einsum("BTNH,BNHV->BTNV", k, state), everything

    error = lambda o, n=64: float(np.sqrt(((o - v)[:, :n] ** 2).mean()))
    stored = lambda n: (np.arange(64) < n).astype(np.float32)[None, :, None]
    (few, _), (many, full) = (jax.device_get(recall(stored(n), k, v)) for n in (2, 64))
    assert error(few, 2) < 0.3 < 0.6 < error(many)
    assert error(full) < 0.01


def test_module_stores_under_unit_keys():
    """A convolution of one tap is in the test of the module of Gated DeltaNet."""
    module = lib.DeltaNet(num_heads=2, head_dim=4, value_dim=6, conv_width=4)
    x = draw(1, 5, 8)
    params = like(jax.eval_shape(module.init, KEY, x))

    @jax.jit
    def both(params, x):
        w = params["params"]

        def project(name):
            y = jnp.einsum("BTD,DNH->BTNH", x, w[name]["project"]["heads"]["kernel"])
            taps = w[name]["conv"]["kernel"]["table"]
            shifted = (jnp.pad(y, ((0, 0), (i, 0), (0, 0), (0, 0)))[:, :5] for i in range(4))
            return jax.nn.silu(sum(y * taps[i][None, None] for i, y in enumerate(shifted)))

        unit = lambda x: x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)
        q, k, v = unit(project("query")), unit(project("key")), project("value")
        o = lib.delta_net(q, k, v, jax.nn.sigmoid(x @ w["beta"]["dense"]["kernel"]))
        o = (
            o
            / jnp.sqrt((o**2).mean(-1, keepdims=True) + 1e-6)
            * w["norm"]["scale"][None, None, None]
        )
        return module.apply(params, x), jnp.einsum("BTNV,NVD->BTD", o, w["out"]["merge"]["kernel"])

    chex.assert_trees_all_close(*both(params, x), rtol=1e-4, atol=1e-5)
