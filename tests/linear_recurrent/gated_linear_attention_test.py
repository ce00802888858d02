"""Only what is particular to gated linear attention; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp

from attnjax.core import edit, masks
from attnjax.linear_recurrent import gated_linear_attention as lib
from attnjax.linear_recurrent import retention
from tests import training

KEY = jax.random.key(0)


def test_with_a_constant_decay_it_is_retention():
    args = lib.SPEC.example(KEY, 70)
    fixed = retention.log_decays(4)
    args["log_decay"] = jnp.broadcast_to(fixed[None, None, :, None], args["k"].shape)
    expected = retention.retention(args["q"] * 8**0.5, args["k"], args["v"], fixed)
    actual = lib.gated_linear_attention(**args)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_weights_fade_by_the_gates_between():
    """Eq. 3 unrolled, over a distance of many chunks."""
    args = lib.SPEC.example(KEY, 200)
    w = jax.jit(lambda: edit.matrix(lib.gated_linear_attention, **args))()
    for t, s in ((199, 0), (150, 60), (70, 63), (9, 9)):
        fade = jnp.exp(args["log_decay"][:, s + 1 : t + 1].sum(1))
        expected = (args["q"][:, t] * fade * args["k"][:, s]).sum(-1)
        chex.assert_trees_all_close(w[:, :, t, s], expected, rtol=1e-4, atol=1e-6)


def test_channels_forget_each_by_itself():
    """What one decay for the head can't do: one channel keeps all while another keeps nothing."""
    args = lib.SPEC.example(KEY, 40)
    forget = jnp.where(jnp.arange(8) < 4, 0.0, -100.0)
    args["log_decay"] = jnp.broadcast_to(forget[None, None, None], args["k"].shape)
    kept, new = (
        jnp.einsum("BTNH,BSNH->BNTS", args["q"][..., at], args["k"][..., at])
        for at in (slice(0, 4), slice(4, 8))
    )
    w = kept * jnp.tri(40)[None, None] + new * jnp.eye(40)[None, None]
    expected = jnp.einsum("BNTS,BSNV->BTNV", w, args["v"])
    actual = lib.gated_linear_attention(**args)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_gate_that_closes_is_the_begin_of_a_document():
    args = lib.SPEC.example(KEY, 30)
    # multiples of 2^-10 have exact sums, so that a gate of -30 rounds no other exponent
    args["log_decay"] = jnp.round(args["log_decay"] * 2**10) / 2**10
    closed = args | dict(log_decay=args["log_decay"].at[:, 11].set(-30.0))
    mask = masks.Segments(jnp.broadcast_to((jnp.arange(30) >= 11)[None], (2, 30)).astype(int))
    expected = lib.gated_linear_attention(**args, mask=mask)
    actual = lib.gated_linear_attention(**closed)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_gates_are_roots_near_one():
    z = jnp.array([-20.0, 0.0, 20.0])[None, None, None]
    expected = jax.nn.sigmoid(z) ** (1 / 16)
    chex.assert_trees_all_close(jnp.exp(lib.log_decays(z)), expected, rtol=1e-5)


def test_module_has_a_gate_of_low_rank():
    module = lib.GatedLinearAttention(num_heads=2, head_dim=4, value_dim=6, gate_rank=3)
    x = jax.random.normal(KEY, (1, 5, 8))
    params = module.init(KEY, x)
    params["params"]["decay_bias"]["table"] = jax.random.normal(KEY, (2, 4))
    w = {name: jax.tree.leaves(leaf)[0] for name, leaf in params["params"].items()}
    heads = lambda x, name: jnp.einsum("BTD,DNH->BTNH", x, w[name])
    assert w["decay_in"].shape == (8, 3)
    decay = heads(x @ w["decay_in"], "decay_out") + w["decay_bias"][None, None]
    arrays = (heads(x, name) for name in ("query", "key", "value"))
    o = lib.gated_linear_attention(*arrays, lib.log_decays(decay))
    o = o / jnp.sqrt((o**2).mean(-1, keepdims=True) + 1e-6) * jax.nn.swish(heads(x, "gate"))
    expected = jnp.einsum("BTNV,NVD->BTD", o, w["out"])
    chex.assert_trees_all_close(module.apply(params, x), expected, rtol=1e-4, atol=1e-5)


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

    start = dict(bias=jnp.array(0.0), gate=jnp.array(0.0), scale=jnp.array(1.0))
    without = lambda params, key: loss(params | dict(gate=0.0), key)
    gated, fixed = (
        fn(training.fit(fn, start, steps=300, learning_rate=0.1), jax.random.key(9))
        for fn in (loss, without)
    )
    assert gated < 0.1 and fixed > 1
