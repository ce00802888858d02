"""Against the equation with a dense matrix, for each mask; and a normaliser of zero."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import linear_attention as ops
from tests import cost, cotangents

T = 21
DRAW = np.random.default_rng(0)
Q, K = (jnp.asarray(np.log1p(np.exp(DRAW.normal(size=(2, T, 3, 4)))), "float32") for _ in range(2))
V = jnp.asarray(DRAW.normal(size=(2, T, 3, 5)), "float32")
SEEN = np.ones((2, T), bool)
SEEN[0, :4] = SEEN[1, 9:13] = False
PADDED = masks.Valid(jnp.asarray(SEEN))
PACKED = masks.Segments(jnp.asarray(np.tile(np.arange(T) // 8, (2, 1))))


def oracle(q, k, v, mask):
    w = jnp.einsum("BTNF,BSNF->BNTS", q, k)
    w = jnp.where(masks.dense(mask, q.shape[1], k.shape[1]), w, 0)
    total = w.sum(-1, keepdims=True)
    return jnp.einsum("BNTS,BSNV->BTNV", w / jnp.where(total > 0, total, 1), v)


def with_gradients(fn):
    o, vjp = jax.vjp(fn, Q, K, V)
    return o, vjp(cotangents.like(o))


CASES = {
    "all": None,
    "causal": masks.Causal(),
    "padded": PADDED,
    "causal, padded": masks.Causal() & PADDED,
    "causal, packed": PACKED & masks.Causal(),
}


@pytest.mark.parametrize("mask", CASES.values(), ids=CASES)
def test_equals_the_equation_under_the_dense_mask(mask):
    fast = lambda q, k, v: ops.linear_attention(q, k, v, mask=mask)[0]
    slow = functools.partial(oracle, mask=mask)
    actual, expected = jax.jit(lambda: (with_gradients(fast), with_gradients(slow)))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_takes_other_keys_than_queries():
    run = lambda q: (ops.linear_attention(q[:, :5], K, V)[0], oracle(q[:, :5], K, V, None))
    chex.assert_trees_all_close(*jax.jit(run)(Q), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [None, masks.Causal()], ids=["all", "causal"])
def test_state_stands_for_the_keys_before(mask):
    run = functools.partial(ops.linear_attention, mask=mask)

    @jax.jit
    def both(q, k, v):
        whole, last = run(q, k, v)
        _, state = run(q[:, :9], k[:, :9], v[:, :9])
        return run(q[:, 9:], k[:, 9:], v[:, 9:], initial_state=state), (whole[:, 9:], last)

    chex.assert_trees_all_close(*both(Q, K, V), rtol=1e-5, atol=1e-5)


def test_normaliser_of_nothing_gives_zeros():
    @jax.jit
    def run(scale):
        return with_gradients(
            lambda q, k, v: ops.linear_attention(q * scale, k * scale, v, mask=masks.Causal())[0]
        )

    for scale in (0.0, 1e-15):
        for leaf in jax.tree.leaves(run(np.float32(scale))):
            assert not np.any(leaf)


def test_small_normaliser_is_no_zero():
    fn = lambda q, k, v: ops.linear_attention(q * 1e-8, k * 1e-8, v)[0]
    slow = functools.partial(oracle, mask=None)
    actual, expected = jax.jit(lambda: (with_gradients(fn), with_gradients(slow)))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_causal_form_is_linear_in_time_and_memory():
    def run(q, k, v):
        loss = lambda *qkv: sum(x.sum() for x in ops.linear_attention(*qkv, mask=masks.Causal()))
        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    shapes = lambda T: [jax.ShapeDtypeStruct((2, T, 3, 4), jnp.float32)] * 3
    for measure in (cost.largest_array, cost.operations):
        assert measure(run, *shapes(4096)) <= 2.1 * measure(run, *shapes(2048))


def test_keeps_bfloat16():
    short = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (Q, K, V)]
    o, state = jax.eval_shape(ops.linear_attention, *short)
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32


def test_refuses_what_it_cannot_honour():
    with pytest.raises(NotImplementedError, match="me can honour Segments only together with"):
        ops.linear_attention(Q, K, V, mask=PACKED, by="me")
    with pytest.raises(NotImplementedError, match="me can't honour Window"):
        ops.linear_attention(Q, K, V, mask=masks.Window(2), by="me")
