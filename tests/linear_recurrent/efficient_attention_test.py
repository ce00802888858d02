"""The order of products, the two normalisers, and what a few contexts can hold."""

import inspect

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import edit, masks
from attnjax.linear_recurrent import efficient_attention as lib
from attnjax.ops import dot_product_attention
from tests import cost

KEY = jax.random.key(0)


def test_scaling_is_dot_product_attention_over_the_number_of_keys():
    args = lib.SPEC.example(KEY, 32)
    w = jax.jit(lambda: edit.matrix(lib.efficient_attention, **args, normalizer="scaling"))()
    expected = jnp.einsum("BTNH,BSNH->BNTS", args["q"], args["k"]) / 32
    chex.assert_trees_all_close(w, expected, rtol=1e-5, atol=1e-6)


def test_softmax_weights_are_positive_sum_to_one_and_have_the_rank_of_the_contexts():
    w = jax.jit(lambda: edit.matrix(lib.efficient_attention, **lib.SPEC.example(KEY, 32)))()
    assert (w > 0).all()
    chex.assert_trees_all_close(w.sum(-1), jnp.ones((2, 4, 32)), rtol=1e-5)
    singular = jnp.linalg.svd(w, compute_uv=False)
    assert (singular[..., 7] > 1e-4).all() and (singular[..., 8:] < 1e-6).all()


def test_a_context_is_an_average_that_no_query_changes():
    """Channel c of the keys points at position 2c, and query t asks for channel t."""
    sharp = lambda rows: 100 * rows[None, :, None]
    k = sharp(jnp.repeat(jnp.eye(4), 2, 0) * jnp.array([1.0, 0] * 4)[:, None])
    v = jax.random.normal(KEY, (1, 8, 1, 3))
    o = lib.efficient_attention(sharp(jnp.eye(4)), k, v)
    chex.assert_trees_all_close(o, v[:, ::2], rtol=1e-5, atol=1e-6)


def test_with_one_channel_it_is_pooling_by_softmax():
    q, k, v = jax.random.normal(KEY, (3, 2, 9, 2, 1))
    pooled = (jax.nn.softmax(k, axis=1) * v).sum(1, keepdims=True)
    o = lib.efficient_attention(q, k, v)
    chex.assert_trees_all_close(o, jnp.broadcast_to(pooled, o.shape), rtol=1e-5, atol=1e-6)


def test_costs_less_than_weighing_each_key_for_each_query():
    shapes = lambda T: [jax.ShapeDtypeStruct((1, T, 2, 32), jnp.float32)] * 3
    dense = lambda *qkv: dot_product_attention.dot_product_attention(*qkv, implementation="dense")
    for measure, factor in ((cost.operations, 30), (cost.largest_array, 60)):
        assert factor * measure(lib.efficient_attention, *shapes(2048)) < measure(
            dense, *shapes(2048)
        )


@pytest.mark.parametrize("normalizer", ["softmax", "scaling"])
def test_padded_keys_are_as_no_keys(normalizer):
    args = lib.SPEC.example(KEY, 9)
    valid = jnp.ones((2, 9), bool).at[:, 2].set(False).at[:, 7:].set(False)
    kept = jnp.flatnonzero(valid[0])
    mask = masks.Valid(valid.at[:, 2].set(True)) & masks.Valid(valid.at[:, 7:].set(True))
    o = lib.efficient_attention(**args, normalizer=normalizer, mask=mask)
    without = args | {name: args[name][:, kept] for name in "kv"}
    expected = lib.efficient_attention(**without, normalizer=normalizer)
    chex.assert_trees_all_close(o, expected, rtol=1e-5, atol=1e-6)


def test_module_hands_its_normalizer_on():
    module = lib.EfficientAttention(num_heads=2, head_dim=4, normalizer="scaling")
    x = jax.random.normal(KEY, (2, 9, 8))
    params = module.init(KEY, x)
    read = lambda what: edit.read(module.apply, what=what)(params, x)[1]["attend"]
    q, k = read("qk")
    expected = jnp.einsum("BTNH,BSNH->BNTS", q, k) / 9
    chex.assert_trees_all_close(read("weights"), expected, rtol=1e-5, atol=1e-6)


def test_refuses_what_it_cannot_honour():
    args = lib.SPEC.example(KEY, 4)
    with pytest.raises(NotImplementedError, match="efficient_attention can't honour Causal"):
        lib.efficient_attention(**args, mask=masks.Causal())
    with pytest.raises(ValueError, match="normalizer='sum' must be one of"):
        # users run without the annotations' checks
        inspect.unwrap(lib.efficient_attention)(**args, normalizer="sum")
