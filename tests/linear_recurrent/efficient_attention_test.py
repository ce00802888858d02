"""The order of products, the two normalisers, and what a few contexts can hold."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks
from attnjax.linear_recurrent import efficient_attention as lib
from attnjax.ops import dot_product_attention
from tests import cost
from tests.cotangents import like

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def program(normalizer="softmax"):
    run = functools.partial(lib.efficient_attention, normalizer=normalizer)
    matrix = jax.jit(lambda *qkv: edit.matrix(run, *qkv))
    return lambda *qkv: jax.device_get(matrix(*qkv))


def test_scaling_is_dot_product_attention_over_the_number_of_keys():
    q, k, v = normal(3, 2, 32, 4, 8)
    expected = np.einsum("BTNH,BSNH->BNTS", q, k) / 32
    chex.assert_trees_all_close(program("scaling")(q, k, v), expected, rtol=1e-5, atol=1e-6)


def test_softmax_weights_are_positive_sum_to_one_and_have_the_rank_of_the_contexts():
    w = program()(*normal(3, 2, 32, 4, 8))
    assert (w > 0).all()
    chex.assert_trees_all_close(w.sum(-1), np.ones((2, 4, 32), np.float32), rtol=1e-5)
    singular = np.linalg.svd(w, compute_uv=False)
    assert (singular[..., 7] > 1e-4).all() and (singular[..., 8:] < 1e-6).all()


def test_a_context_is_an_average_that_no_query_changes():
    """Channel c of the keys points at position 2c, and query t asks for channel t."""
    eye = np.eye(4, dtype=np.float32)
    sharp = lambda rows: 100 * rows[None, :, None]
    k = sharp(eye.repeat(2, 0) * np.float32([[1.0], [0]] * 4))
    v = normal(1, 8, 1, 3)
    o = jax.jit(lib.efficient_attention)(sharp(eye), k, v)
    chex.assert_trees_all_close(o, v[:, ::2], rtol=1e-5, atol=1e-6)


def test_with_one_channel_it_is_pooling_by_softmax():
    q, k, v = normal(3, 2, 9, 2, 1)
    e = np.exp(k)
    pooled = (e / e.sum(1, keepdims=True) * v).sum(1, keepdims=True)
    o = jax.jit(lib.efficient_attention)(q, k, v)
    chex.assert_trees_all_close(o, np.broadcast_to(pooled, o.shape), rtol=1e-5, atol=1e-6)


def test_costs_less_than_weighing_each_key_for_each_query():
    shapes = lambda T: [jax.ShapeDtypeStruct((1, T, 2, 32), jnp.float32)] * 3
    dense = lambda *qkv: dot_product_attention.dot_product_attention(*qkv, implementation="dense")
    for measure, factor in ((cost.operations, 30), (cost.largest_array, 60)):
        assert factor * measure(lib.efficient_attention, *shapes(2048)) < measure(
            dense, *shapes(2048)
        )


@pytest.mark.parametrize("normalizer", ["softmax", "scaling"])
def test_padded_keys_are_as_no_keys(normalizer):
    valid = np.ones((2, 9), bool)
    valid[:, [2, 7, 8]] = False
    kept = np.flatnonzero(valid[0])
    fn = functools.partial(lib.efficient_attention, normalizer=normalizer)

    @jax.jit
    def both(q, k, v, valid):
        first = jnp.arange(9) < 7
        mask = masks.Valid(valid | ~first[None]) & masks.Valid(valid | first[None])
        return fn(q, k, v, mask=mask), fn(q, k[:, kept], v[:, kept])

    chex.assert_trees_all_close(*both(*normal(3, 2, 9, 4, 8), valid), rtol=1e-5, atol=1e-6)


def test_module_hands_its_normalizer_on():
    module = lib.EfficientAttention(num_heads=2, head_dim=4, normalizer="scaling")
    x = normal(2, 9, 8)
    params = jax.tree.map(
        lambda p: p / 3, jax.device_get(like(jax.eval_shape(module.init, KEY, x)))
    )

    @jax.jit
    def both(params, x):
        read = lambda what: edit.read(module.apply, what=what)(params, x)[1]["attend"]
        q, k = read("qk")
        return read("weights"), jnp.einsum("BTNH,BSNH->BNTS", q, k) / 9

    chex.assert_trees_all_close(*both(params, x), rtol=1e-5, atol=1e-6)


def test_refuses_what_it_cannot_honour():
    args = [jnp.asarray(x) for x in normal(3, 2, 4, 4, 8)]
    causal = functools.partial(lib.efficient_attention, mask=masks.Causal())
    with pytest.raises(NotImplementedError, match="efficient_attention can't honour Causal"):
        jax.eval_shape(causal, *args)
    with pytest.raises(ValueError, match="normalizer='sum' must be one of"):
        # users run without the annotations' checks
        inspect.unwrap(lib.efficient_attention)(*args, normalizer="sum")
