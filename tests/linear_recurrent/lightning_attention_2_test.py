"""Only what is particular to Lightning Attention-2; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import models
from attnjax.core import edit, masks, positions
from attnjax.linear_recurrent import lightning_attention_2 as lib
from tests import cost
from tests.cotangents import like

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def example(T):
    """As that of the record, by numpy."""
    q, k, v = normal(3, 2, T, 4, 16)
    return dict(q=q, k=k, v=v, log_decay=-np.array([0.001, 0.02, 0.3, 1.0], np.float32))


@jax.jit
def matrix(args):
    return edit.matrix(lib.lightning_attention_2, **args)


def products(args):
    return np.einsum("BTNH,BSNH->BNTS", args["q"], args["k"])


def test_without_decay_it_is_linear_attention_without_a_normaliser():
    args = example(200) | dict(log_decay=np.zeros(4, np.float32))
    expected = products(args) * np.tri(200, dtype=np.float32)
    chex.assert_trees_all_close(jax.device_get(matrix(args)), expected, rtol=1e-5, atol=1e-4)


def test_with_the_strongest_decay_a_token_sees_itself_alone():
    args = example(200) | dict(log_decay=np.full(4, -100.0, np.float32))
    expected = products(args) * np.eye(200, dtype=np.float32)
    chex.assert_trees_all_close(jax.device_get(matrix(args)), expected, rtol=1e-5, atol=1e-5)


def test_weights_are_products_faded_by_distance():
    args, lag = example(200), 150
    diagonal = lambda x: np.diagonal(x, -lag, 2, 3)
    faded = np.exp(args["log_decay"] * lag)[:, None] * diagonal(products(args))
    actual = diagonal(jax.device_get(matrix(args)))
    chex.assert_trees_all_close(actual, faded, rtol=1e-4, atol=1e-5)


def test_any_split_through_the_state_equals_the_whole():
    """The free lunch: a sequence of any length in pieces that fit, forwards and backwards."""

    def in_pieces(q, k, v, log_decay):
        state, os = None, []
        for piece in (slice(0, 1), slice(1, 24), slice(24, 40)):
            qkv = (x[:, piece] for x in (q, k, v))
            options = dict(initial_state=state, return_state=True)
            o, state = lib.lightning_attention_2(*qkv, log_decay, **options)
            os.append(o)
        return jnp.concatenate(os, 1)

    @jax.jit
    def both(args):
        loss = lambda fn: jax.value_and_grad(lambda args: (fn(**args) ** 2).mean())(args)
        return loss(in_pieces), loss(lib.lightning_attention_2)

    actual, expected = both(example(40))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_token_costs_the_same_after_any_length():
    run = lambda args: lib.lightning_attention_2(**args)
    shapes = lambda T: jax.eval_shape(lambda: lib.SPEC.example(KEY, T))
    short, long = (cost.operations(run, shapes(T)) / T for T in (1024, 8192))
    assert long <= 1.01 * short


def test_seven_in_eight_layers_of_a_hybrid_remember_in_constant_space():
    """MiniMax-01's stack: what softmax attention keeps of a longer past is an eighth of it all."""
    mixers = ["lightning_attention_2"] * 7 + ["gqa(num_kv_heads=1)"]
    sizes = dict(vocab_size=11, features=8, depth=16, num_heads=2, mlp_ratio=1)
    model = models.create("lm", mixers=mixers, **sizes)
    params = jax.eval_shape(model.init, KEY, jnp.zeros((1, 4), int))
    start = lambda length: model.apply({}, 1, length, method="init_state")
    short, long = (jax.eval_shape(lambda n=n: start(n)).blocks for n in (4, 64))
    shapes = lambda state: jax.tree.map(lambda x: x.shape, state)
    grows = [shapes(a) != shapes(b) for a, b in zip(short, long, strict=True)]
    assert grows == ([False] * 7 + [True]) * 2
    gated = ["gate" in params["params"][f"block_{i}"]["mixer"] for i in range(16)]
    assert gated == ([True] * 7 + [False]) * 2


def test_carry_is_what_becomes_of_an_initial_state():
    @jax.jit
    def both(args, start):
        run = lambda start: lib.lightning_attention_2(
            **args, initial_state=start, return_state=True
        )
        left = run(start)[1] - run(jnp.zeros_like(start))[1]
        return left, lib.SPEC.carry(**args) * start

    start = normal(2, 4, 16, 16, seed=1)
    chex.assert_trees_all_close(*both(example(9), start), rtol=1e-4, atol=1e-5)


def test_packed_documents_and_padding_equal_each_alone_normed_and_gated():
    module = lib.LightningAttention2(num_heads=2, head_dim=4)
    x = normal(1, 12, 8)
    params = like(jax.eval_shape(module.init, KEY, x))
    params = jax.tree.map(lambda p: p / 3, jax.device_get(params))

    @jax.jit
    def run(params, x, ids):
        w = {name: jax.tree.leaves(leaf)[0] for name, leaf in params["params"].items()}
        names = "query", "key", "value", "gate"
        q, k, v, gate = (jnp.einsum("BTD,DNH->BTNH", x[:, 5:], w[name]) for name in names)
        o = lib.lightning_attention_2(jax.nn.silu(q), jax.nn.silu(k), v, lib.log_decays(2))
        o = o / jnp.sqrt((o**2).mean((-2, -1), keepdims=True) + 1e-6) * jax.nn.sigmoid(gate)
        packed = module.apply(params, x, mask=masks.Segments(ids) & masks.Causal())
        padded = module.apply(params, x, mask=masks.Valid(ids > 0))
        return jnp.einsum("BTNH,NHD->BTD", o, w["out"]), packed[:, 5:], padded[:, 5:]

    expected, packed, padded = run(params, x, np.array([[0] * 5 + [1] * 7], np.int32))
    chex.assert_trees_all_close(packed, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(padded, expected, rtol=1e-5, atol=1e-6)


def test_slopes_are_those_of_alibi_and_shrink_with_depth():
    slopes = jax.jit(lambda: (lib.log_decays(4), lib.log_decays(4, layer=9, num_layers=12)))
    first, deep = jax.device_get(slopes())
    chex.assert_trees_all_close(first, -np.float32([1 / 4, 1 / 16, 1 / 64, 1 / 256]))
    chex.assert_trees_all_close(deep, -np.asarray(positions.alibi_slopes(4), np.float32) / 4)
    with pytest.raises(ValueError, match="layer=12 must be at least 0 and below num_layers=12"):
        lib.log_decays(4, layer=12, num_layers=12)


def test_refuses_masks_that_a_recurrence_cannot_honour():
    with pytest.raises(NotImplementedError, match="lightning_attention_2 can't honour Window"):
        run = lambda args: lib.lightning_attention_2(**args, mask=masks.Window(3))
        jax.eval_shape(run, example(8))
