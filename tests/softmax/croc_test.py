"""Only what is particular to Croc; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from attnjax.core import edit, masks
from attnjax.ops import dot_product_attention as ops
from attnjax.softmax import croc as lib
from tests.cotangents import like

KEY = jax.random.key(0)
T = 9


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


VISUAL = np.array([[0, 1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0]], bool)
ARGS = dict(zip("qkv", normal(3, 2, T, 4, 8), strict=True)) | dict(visual=VISUAL)
MODULE = lib.Croc(num_heads=2, head_dim=4, rotary_base=100.0)
X = normal(2, T, 8)
PARAMS = like(jax.eval_shape(MODULE.init, KEY, X))
PARAMS = jax.tree.map(lambda p: p / 3, jax.device_get(PARAMS))
FIRST = np.broadcast_to(np.arange(T) < 4, (2, T))  # an image, then text


def test_the_mask_is_causal_or_between_tokens_of_images():
    v = VISUAL
    expected = np.tril(np.ones((T, T), bool)) | (v[:, :, None] & v[:, None])
    w = jax.device_get(jax.jit(lambda args: edit.matrix(lib.croc, **args))(ARGS))
    np.testing.assert_array_equal(w > 0, np.broadcast_to(expected[:, None], w.shape))


def test_an_image_before_the_text_is_a_prefix():
    @jax.jit
    def both(args):
        qkv = {name: args[name] for name in "qkv"}
        prefix = ops.dot_product_attention(**qkv, mask=masks.Causal() | masks.Prefix(4))
        return lib.croc(**args), prefix

    chex.assert_trees_all_close(*both(ARGS | dict(visual=FIRST)), rtol=1e-5, atol=1e-6)


def test_text_reaches_no_image_and_images_reach_all_text_after_them():
    @jax.jit
    def jacobian(params, x, visual):
        run = lambda x: MODULE.apply(params, x, visual=visual)
        return jax.jacobian(lambda x: run(run(x)).sum((0, 2)))(x)  # T B T D

    reached = (jax.device_get(jacobian(PARAMS, X, FIRST)) != 0).any((1, 3))
    assert not reached[:4, 4:].any() and reached[:4, :4].all() and reached[4:, :4].all()


def test_streams_an_image_that_comes_whole():
    @jax.jit
    def both(params, x, seen):
        state, ys = MODULE.apply(params, 2, T, method="init_state"), []
        for start, end in ((0, 1), (1, 5), (5, 9)):
            piece = dict(visual=seen[:, start:end])
            state, y = MODULE.apply(params, state, x[:, start:end], method="extend", **piece)
            ys.append(y)
        return jnp.concatenate(ys, 1), MODULE.apply(params, x, visual=seen)

    seen = np.broadcast_to((np.arange(T) >= 1) & (np.arange(T) < 5), (2, T))
    chex.assert_trees_all_close(*both(PARAMS, X, seen), rtol=1e-4, atol=1e-5)


# ---- the pool ----

assign = jax.jit(lib.assign)


@pytest.mark.parametrize("shape", [(1, 1), (6, 6), (5, 9)])
def test_assignment_has_the_least_cost(shape):
    for seed in range(10):
        cost = normal(*shape, seed=seed)
        rows, columns = optimize.linear_sum_assignment(cost)
        np.testing.assert_array_equal(jax.device_get(assign(cost))[rows], columns)


def test_assignment_of_equal_costs_takes_no_column_twice():
    assert sorted(assign(np.zeros((6, 6), np.float32)).tolist()) == list(range(6))
    with pytest.raises(ValueError, match="3 columns must be at least the 4 rows"):
        jax.eval_shape(lib.assign, np.zeros((4, 3), np.float32))


def test_replaced_tokens_are_the_nearest_of_the_pool_each_taken_once():
    pool, x, replace = normal(5, 8), np.zeros((2, 4, 8), np.float32), jax.jit(lib.replace_tokens)
    x[:, 0], x[:, 2] = pool[3] + 0.01, pool[1] - 0.01
    y = jax.device_get(replace(x, pool, np.array([[2, 0], [0, 1]], np.int32)))
    expected = x[0].copy()
    expected[[0, 2]] = pool[[3, 1]]
    chex.assert_trees_all_equal(y[0], expected)
    chex.assert_trees_all_equal(y[1, 2:], x[1, 2:])
    x[:, 2] = x[:, 0]
    twice = jax.device_get(replace(x, pool, np.array([[0, 2]] * 2, np.int32)))
    assert (twice[:, 0] != twice[:, 2]).any(-1).all()  # though pool[3] is the nearest to both


def test_the_pool_learns_where_it_is_used():
    pool, x, order = normal(5, 8), normal(1, 4, 8, seed=1), np.array([[1, 3]], np.int32)

    @jax.jit
    @jax.value_and_grad
    def loss(pool):
        replaced = lib.replace_tokens(jnp.asarray(x), pool, jnp.asarray(order))
        return lib.reconstruction_loss(replaced, jnp.asarray(x))

    before, grad = jax.device_get(loss(pool))
    assert grad.any(-1).sum() == 2
    assert loss(pool - 0.01 * grad)[0] < before


def test_loss_is_quadratic_for_small_errors_and_linear_for_large_ones():
    run = jax.jit(jax.value_and_grad(lib.reconstruction_loss, 1))
    zero = np.zeros((1, 2, 3), np.float32)
    loss = lambda e: run(zero + np.float32(e), zero)[0]
    np.testing.assert_allclose([loss(0.005), loss(-0.005)], 10 * 0.005**2 / 0.02, rtol=1e-5)
    np.testing.assert_allclose([loss(1.0), loss(-2.0)], [9.95, 19.95], rtol=1e-5)
    x, y = normal(2, 1, 2, 3)
    assert not jax.device_get(run(y, x)[1]).any()
