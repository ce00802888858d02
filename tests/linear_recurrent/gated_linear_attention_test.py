"""Only what is particular to gated linear attention; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import edit, masks
from attnjax.linear_recurrent import gated_linear_attention as lib
from attnjax.linear_recurrent import retention
from tests import training
from tests.cotangents import like

KEY = jax.random.key(0)
matrix = jax.jit(lambda args: edit.matrix(lib.gated_linear_attention, **args))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def example(T):
    """As that of the record, by numpy."""
    q, k, v, gate = draw(4, 2, T, 4, 8)
    return dict(q=q, k=k, v=v, log_decay=-np.log1p(np.exp(-4 * gate)) / 16)


def test_with_a_constant_decay_it_is_retention():
    @jax.jit
    def both(q, k, v):
        fixed = retention.log_decays(4)
        log_decay = jnp.broadcast_to(fixed[None, None, :, None], k.shape)
        expected = retention.retention(q * 8**0.5, k, v, fixed)
        return lib.gated_linear_attention(q, k, v, log_decay), expected

    chex.assert_trees_all_close(*both(*draw(3, 2, 70, 4, 8)), rtol=1e-4, atol=1e-5)


def test_weights_fade_by_the_gates_between():
    """Eq. 3 unrolled, over a distance of many chunks."""
    args = example(200)
    w = jax.device_get(matrix(args))
    for t, s in ((199, 0), (150, 60), (70, 63), (9, 9)):
        fade = np.exp(args["log_decay"][:, s + 1 : t + 1].sum(1))
        expected = (args["q"][:, t] * fade * args["k"][:, s]).sum(-1)
        chex.assert_trees_all_close(w[:, :, t, s], expected, rtol=1e-4, atol=1e-6)


def test_channels_forget_each_by_itself():
    """What one decay for the head can't do: one channel keeps all while another keeps nothing."""
    args = example(200)  # of the size used above
    forget = np.where(np.arange(8) < 4, 0.0, -100.0).astype(np.float32)
    args["log_decay"] = np.broadcast_to(forget[None, None, None], args["k"].shape)
    kept, new = (
        np.einsum("BTNH,BSNH->BNTS", args["q"][..., at], args["k"][..., at])
        for at in (slice(0, 4), slice(4, 8))
    )
    expected = kept * np.tri(200, dtype=np.float32) + new * np.eye(200, dtype=np.float32)
    chex.assert_trees_all_close(jax.device_get(matrix(args)), expected, rtol=1e-4, atol=1e-4)


def test_a_gate_that_closes_is_the_begin_of_a_document():
    args = example(30)
    # multiples of 2^-10 have exact sums, so that a gate of -30 rounds no other exponent
    args["log_decay"] = np.round(args["log_decay"] * 2**10) / 2**10
    closed = args["log_decay"].copy()
    closed[:, 11] = -30.0

    @jax.jit
    def both(args, closed, ids):
        expected = lib.gated_linear_attention(**args, mask=masks.Segments(ids))
        return lib.gated_linear_attention(**args | dict(log_decay=closed)), expected

    ids = np.broadcast_to((np.arange(30) >= 11)[None], (2, 30)).astype(np.int32)
    chex.assert_trees_all_close(*both(args, closed, ids), rtol=1e-5, atol=1e-6)


def test_gates_are_roots_near_one():
    z = np.array([-20.0, 0.0, 20.0], np.float32)[None, None, None]
    expected = (1 / (1 + np.exp(-z))) ** (1 / 16)
    actual = np.exp(jax.device_get(jax.jit(lib.log_decays)(z)))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


def test_module_has_a_gate_of_low_rank():
    module = lib.GatedLinearAttention(num_heads=2, head_dim=4, value_dim=6, gate_rank=3)
    x = draw(1, 5, 8)
    params = like(jax.eval_shape(module.init, KEY, x))

    @jax.jit
    def both(params, x):
        w = {name: jax.tree.leaves(leaf)[0] for name, leaf in params["params"].items()}
        heads = lambda x, name: jnp.einsum("BTD,DNH->BTNH", x, w[name])
        assert w["decay_in"].shape == (8, 3)
        decay = heads(x @ w["decay_in"], "decay_out") + w["decay_bias"][None, None]
        arrays = (heads(x, name) for name in ("query", "key", "value"))
        o = lib.gated_linear_attention(*arrays, lib.log_decays(decay))
        o = o / jnp.sqrt((o**2).mean(-1, keepdims=True) + 1e-6) * w["norm"][None, None, None]
        o = o * jax.nn.swish(heads(x, "gate"))
        return module.apply(params, x), jnp.einsum("BTNV,NVD->BTD", o, w["out"])

    chex.assert_trees_all_close(*both(params, x), rtol=1e-4, atol=1e-5)


def test_learns_to_forget_where_no_fixed_decay_can():
    """The headline, gates made of the data: count the ones since the last marker."""
    T = 16

    def draw(key):
        marker, one = jax.random.bernoulli(key, jnp.array([[[0.15]], [[0.5]]]), (2, 8, T))
        step = lambda count, x: (jnp.where(x[0], 0, count) + x[1],) * 2
        _, count = jax.lax.scan(step, jnp.zeros(8), (marker.T, one.astype(jnp.float32).T))
        return marker.astype(jnp.float32), one.astype(jnp.float32)[..., None, None], count.T

    def loss(params, key):
        marker, one, count = draw(key)
        log_decay = -jax.nn.softplus(params["bias"] + params["gate"] * marker)[..., None, None]
        o = lib.gated_linear_attention(jnp.ones_like(one), one, jnp.ones_like(one), log_decay)
        return ((params["scale"] * o[..., 0, 0] - count) ** 2).mean()

    def side_by_side(params, key):
        """Of a model with a gate and of one without, which learn independently of each other."""
        used = params | dict(gate=params["gate"] * np.array([1.0, 0.0], np.float32))
        return jax.vmap(loss, (0, None))(used, key)

    zero = np.zeros(2, np.float32)
    params = training.fit(
        lambda *args: side_by_side(*args).sum(),
        dict(bias=zero, gate=zero, scale=zero + 1),
        steps=300,
        learning_rate=0.1,
    )
    gated, fixed = jax.jit(side_by_side)(params, jax.random.key(9))
    assert gated < 0.1 and fixed > 1
