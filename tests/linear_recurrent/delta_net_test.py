"""Only what is particular to DeltaNet; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.linear_recurrent import delta_net as lib
from attnjax.linear_recurrent import gated_linear_attention as gla
from attnjax.ops import dot_product_attention as softmax
from attnjax.ops import unit_vectors

KEY = jax.random.key(0)


def stores(T, size=8):
    """T associations of values with keys drawn, again and again, from an orthonormal basis."""
    keys = jax.random.split(KEY, 3)
    basis = jnp.linalg.qr(jax.random.normal(keys[0], (size, size)))[0]
    names = jax.random.randint(keys[1], (1, T), 0, size)
    return names, basis, basis[names][:, :, None], jax.random.normal(keys[2], (1, T, 1, 3))


def test_recalls_the_last_value_of_every_key():
    """The headline: what is stored again is replaced, where plain linear attention adds up."""
    names, basis, k, v = stores(100)
    assert len(jnp.unique(names)) == 8
    beta = jnp.ones((1, 100, 1))
    _, state = lib.delta_net(k, k, v, beta, return_state=True)
    last = jnp.stack([v[0, jnp.max(jnp.flatnonzero(names[0] == i)), 0] for i in range(8)])
    chex.assert_trees_all_close(basis @ state[0, 0], last, rtol=1e-4, atol=1e-4)
    _, state = gla.gated_linear_attention(k, k, v, jnp.zeros_like(k), return_state=True)
    total = jnp.zeros((8, 3)).at[names[0]].add(v[0, :, 0])
    chex.assert_trees_all_close(basis @ state[0, 0], total, rtol=1e-4, atol=1e-4)


def test_beta_is_how_much_is_replaced():
    _, _, k, v = stores(2)
    k = k.at[:, 1].set(k[:, 0])
    for beta in (0.0, 0.3, 1.0):
        second = jnp.array([[[1.0], [beta]]])
        o = lib.delta_net(k, k, v, second)
        mixed = (1 - beta) * v[:, 0] + beta * v[:, 1]
        chex.assert_trees_all_close(o[:, 1], mixed, rtol=1e-5, atol=1e-6)


def test_each_token_is_a_step_of_gradient_descent():
    args = lib.SPEC.example(KEY, 7)

    def learn(state, k, v, beta):
        loss = lambda state: ((jnp.einsum("BNHV,BNH->BNV", state, k) - v) ** 2).sum() / 2
        return state - beta[..., None, None] * jax.grad(loss)(state)

    @jax.jit
    def descend():
        state = jnp.zeros((2, 4, 8, 8))
        for t in range(7):
            state = learn(state, *(args[name][:, t] for name in ("k", "v", "beta")))
        return state

    _, state = lib.delta_net(**args, return_state=True)
    chex.assert_trees_all_close(state, descend(), rtol=1e-4, atol=1e-5)


def test_under_orthogonal_keys_it_is_linear_attention():
    """Nothing is found under a new key, so nothing is replaced."""
    basis = jnp.linalg.qr(jax.random.normal(KEY, (8, 8)))[0]
    q, v = jax.random.normal(KEY, (2, 1, 8, 1, 8))
    k, beta = basis[None, :, None], jax.random.uniform(KEY, (1, 8, 1))
    expected = gla.gated_linear_attention(q, k, v * beta[..., None], jnp.zeros_like(k))
    chex.assert_trees_all_close(lib.delta_net(q, k, v, beta), expected, rtol=1e-4, atol=1e-5)


def test_with_beta_2_and_no_values_tokens_only_reflect():
    """A state of any length stays as large as it was: with beta <= 2 it can't grow."""
    args = lib.SPEC.example(KEY, 150)
    start = jax.random.normal(KEY, (2, 4, 8, 8))
    args |= dict(v=0 * args["v"], beta=jnp.full((2, 150, 4), 2.0))
    _, state = lib.delta_net(**args, initial_state=start, return_state=True)
    norm = lambda x: jnp.sqrt((x**2).sum((-2, -1)))
    chex.assert_trees_all_close(norm(state), norm(start), rtol=1e-4)


def test_full_attention_recalls_more_keys_than_a_state_has():
    """Why the study mixes in full attention: 8 key channels hold 8 values, a cache holds all."""
    k = unit_vectors.unit(jax.random.normal(KEY, (1, 64, 1, 8)))
    v = jax.random.normal(jax.random.key(1), (1, 64, 1, 3))
    error = lambda o: float(jnp.sqrt(((o - v) ** 2).mean()))

    def recalled(n):
        _, state = lib.delta_net(
            k[:, :n], k[:, :n], v[:, :n], jnp.ones((1, n, 1)), return_state=True
        )
        o = jnp.einsum("BTNH,BNHV->BTNV", k[:, :n], state)
        return float(jnp.sqrt(((o - v[:, :n]) ** 2).mean()))

    assert recalled(2) < 0.3 < 0.6 < recalled(64)
    assert error(softmax.dot_product_attention(k, k, v, scale=1e3)) < 0.01


@pytest.mark.parametrize("width", [1, 4])
def test_module_stores_under_unit_keys(width):
    module = lib.DeltaNet(num_heads=2, head_dim=4, value_dim=6, conv_width=width)
    x = jax.random.normal(KEY, (1, 5, 8))
    params = module.init(KEY, x)
    w = params["params"]

    def project(name):
        y = jnp.einsum("BTD,DNH->BTNH", x, w[name]["project"]["heads"]["kernel"])
        taps = w[name]["conv"]["kernel"]["table"]
        shifted = (jnp.pad(y, ((0, 0), (i, 0), (0, 0), (0, 0)))[:, :5] for i in range(width))
        return jax.nn.silu(sum(y * taps[i][None, None] for i, y in enumerate(shifted)))

    unit = lambda x: x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)
    q, k, v = unit(project("query")), unit(project("key")), project("value")
    o = lib.delta_net(q, k, v, jax.nn.sigmoid(x @ w["beta"]["dense"]["kernel"]))
    o = o / jnp.sqrt((o**2).mean(-1, keepdims=True) + 1e-6)
    expected = jnp.einsum("BTNV,NVD->BTD", o, w["out"]["merge"]["kernel"])
    chex.assert_trees_all_close(module.apply(params, x), expected, rtol=1e-4, atol=1e-5)
