"""Only what is particular to Lightning Attention-2; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax import models
from attnjax.core import edit, masks, positions
from attnjax.linear_recurrent import lightning_attention_2 as lib
from tests import cost

KEY = jax.random.key(0)


def test_without_decay_it_is_linear_attention_without_a_normaliser():
    args = lib.SPEC.example(KEY, 32) | dict(log_decay=jnp.zeros(4))
    scores = jnp.einsum("BTNH,BSNH->BNTS", args["q"], args["k"]) * jnp.tri(32)[None, None]
    expected = jnp.einsum("BNTS,BSNV->BTNV", scores, args["v"])
    chex.assert_trees_all_close(lib.lightning_attention_2(**args), expected, rtol=1e-5, atol=1e-4)


def test_with_the_strongest_decay_a_token_sees_itself_alone():
    args = lib.SPEC.example(KEY, 32) | dict(log_decay=jnp.full(4, -100.0))
    expected = jnp.einsum("BTNH,BTNH->BTN", args["q"], args["k"])[..., None] * args["v"]
    chex.assert_trees_all_close(lib.lightning_attention_2(**args), expected, rtol=1e-5, atol=1e-5)


def test_weights_are_products_faded_by_distance():
    args = lib.SPEC.example(KEY, 200)
    w = jax.jit(lambda: edit.matrix(lib.lightning_attention_2, **args))()
    products = jnp.einsum("BTNH,BSNH->BNTS", args["q"], args["k"])
    lag = 150
    faded = jnp.exp(args["log_decay"] * lag)[None, :, None] * jnp.diagonal(products, -lag, 2, 3)
    chex.assert_trees_all_close(jnp.diagonal(w, -lag, 2, 3), faded, rtol=1e-4, atol=1e-5)


def test_any_split_through_the_state_equals_the_whole():
    """The free lunch: a sequence of any length in pieces that fit, forwards and backwards."""
    args = lib.SPEC.example(KEY, 40)

    def in_pieces(q, k, v):
        state, os = None, []
        for piece in (slice(0, 1), slice(1, 24), slice(24, 40)):
            qkv = (x[:, piece] for x in (q, k, v))
            options = dict(initial_state=state, return_state=True)
            o, state = lib.lightning_attention_2(*qkv, args["log_decay"], **options)
            os.append(o)
        return jnp.concatenate(os, 1)

    def loss(fn):
        qkv = args["q"], args["k"], args["v"]
        return jax.value_and_grad(lambda *qkv: (fn(*qkv) ** 2).mean(), (0, 1, 2))(*qkv)

    whole = lambda *qkv: lib.lightning_attention_2(*qkv, args["log_decay"])
    actual, expected = jax.jit(lambda: (loss(in_pieces), loss(whole)))()
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
    args = lib.SPEC.example(KEY, 9)
    start = jax.random.normal(KEY, (2, 4, 16, 16))
    end = lambda start: lib.lightning_attention_2(**args, initial_state=start, return_state=True)[1]
    left = end(start) - end(jnp.zeros_like(start))
    chex.assert_trees_all_close(left, lib.SPEC.carry(**args) * start, rtol=1e-4, atol=1e-5)


def test_packed_documents_and_padding_equal_each_document_alone():
    module = lib.LightningAttention2(num_heads=2, head_dim=4)
    x = jax.random.normal(KEY, (1, 12, 8))
    params = jax.jit(module.init)(KEY, x)
    segments = masks.Segments(jnp.array([[0] * 5 + [1] * 7]))
    valid = masks.Valid(jnp.arange(12)[None] >= 5)

    @jax.jit
    def run(x):
        alone = module.apply(params, x[:, 5:])
        packed = module.apply(params, x, mask=segments & masks.Causal())
        return alone, packed[:, 5:], module.apply(params, x, mask=valid)[:, 5:]

    alone, packed, padded = run(x)
    chex.assert_trees_all_close(packed, alone, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(padded, alone, rtol=1e-5, atol=1e-6)


def test_module_normalises_and_gates():
    module = lib.LightningAttention2(num_heads=2, head_dim=4)
    x = jax.random.normal(KEY, (1, 6, 8))
    params = module.init(KEY, x)
    w = {name: jax.tree.leaves(leaf)[0] for name, leaf in params["params"].items()}
    q, k, v, gate = (
        jnp.einsum("BTD,DNH->BTNH", x, w[name]) for name in ("query", "key", "value", "gate")
    )
    o = lib.lightning_attention_2(jax.nn.silu(q), jax.nn.silu(k), v, lib.log_decays(2))
    o = o / jnp.sqrt((o**2).mean((-2, -1), keepdims=True) + 1e-6) * jax.nn.sigmoid(gate)
    expected = jnp.einsum("BTNH,NHD->BTD", o, w["out"])
    chex.assert_trees_all_close(module.apply(params, x), expected, rtol=1e-5, atol=1e-5)


def test_slopes_are_those_of_alibi_and_shrink_with_depth():
    chex.assert_trees_all_close(lib.log_decays(4), -jnp.array([1 / 4, 1 / 16, 1 / 64, 1 / 256]))
    deep = lib.log_decays(4, layer=9, num_layers=12)
    chex.assert_trees_all_close(deep, -jnp.asarray(positions.alibi_slopes(4)) / 4)
    with pytest.raises(ValueError, match="layer=12 must be at least 0 and below num_layers=12"):
        lib.log_decays(4, layer=12, num_layers=12)


def test_refuses_masks_that_a_recurrence_cannot_honour():
    with pytest.raises(NotImplementedError, match="lightning_attention_2 can't honour Window"):
        lib.lightning_attention_2(**lib.SPEC.example(KEY, 8), mask=masks.Window(3))
