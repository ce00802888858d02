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

KEY = jax.random.key(0)
T = 9
VISUAL = jnp.array([[0, 1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0]], bool)
ARGS = lib.SPEC.example(KEY, T) | dict(visual=VISUAL)
MODULE = lib.Croc(num_heads=2, head_dim=4, rotary_base=100.0)
X = jax.random.normal(KEY, (2, T, 8))
PARAMS = jax.jit(MODULE.init)(KEY, X)
first = VISUAL.at[:].set(jnp.arange(T) < 4)  # an image, then text


def test_the_mask_is_causal_or_between_tokens_of_images():
    v = np.asarray(VISUAL)
    expected = np.tril(np.ones((T, T), bool)) | (v[:, :, None] & v[:, None])
    w = edit.matrix(lib.croc, *ARGS.values())
    np.testing.assert_array_equal(w > 0, np.broadcast_to(expected[:, None], w.shape))


def test_an_image_before_the_text_is_a_prefix():
    args = {name: ARGS[name] for name in "qkv"}
    prefix = ops.dot_product_attention(**args, mask=masks.Causal() | masks.Prefix(4))
    chex.assert_trees_all_close(lib.croc(**args, visual=first), prefix, rtol=1e-5, atol=1e-6)


def test_text_reaches_no_image_and_images_reach_all_text_after_them():
    twice = lambda x: MODULE.apply(PARAMS, MODULE.apply(PARAMS, x, visual=first), visual=first)
    jacobian = jax.jit(jax.jacobian(lambda x: twice(x).sum((0, 2))))(X)  # T B T D
    reached = np.asarray((jacobian != 0).any((1, 3)))
    assert not reached[:4, 4:].any() and reached[:4, :4].all() and reached[4:, :4].all()


def test_streams_an_image_that_comes_whole():
    @jax.jit
    def stream():
        state, ys = MODULE.apply(PARAMS, 2, T, method="init_state"), []
        for start, end in ((0, 1), (1, 5), (5, 6), (6, 9)):
            piece = dict(visual=seen[:, start:end])
            state, y = MODULE.apply(PARAMS, state, X[:, start:end], method="extend", **piece)
            ys.append(y)
        return jnp.concatenate(ys, 1)

    seen = jnp.broadcast_to((jnp.arange(T) >= 1) & (jnp.arange(T) < 5), (2, T))
    expected = MODULE.apply(PARAMS, X, visual=seen)
    chex.assert_trees_all_close(stream(), expected, rtol=1e-4, atol=1e-5)


# ---- the pool ----


@pytest.mark.parametrize("shape", [(1, 1), (6, 6), (5, 9)])
def test_assignment_has_the_least_cost(shape):
    assign = jax.jit(lib.assign)
    for seed in range(10):
        cost = jax.random.normal(jax.random.key(seed), shape)
        rows, columns = optimize.linear_sum_assignment(cost)
        np.testing.assert_array_equal(assign(cost)[rows], columns)


def test_assignment_of_equal_costs_takes_no_column_twice():
    assert sorted(lib.assign(jnp.zeros((4, 4))).tolist()) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="3 columns must be at least the 4 rows"):
        lib.assign(jnp.zeros((4, 3)))


def test_replaced_tokens_are_the_nearest_of_the_pool_each_taken_once():
    pool = jax.random.normal(KEY, (5, 8))
    x = jnp.zeros((2, 4, 8)).at[:, 0].set(pool[3] + 0.01).at[:, 2].set(pool[1] - 0.01)
    replaced = jnp.array([[2, 0], [0, 1]])
    y = jax.jit(lib.replace_tokens)(x, pool, replaced)
    chex.assert_trees_all_equal(y[0], x[0].at[0].set(pool[3]).at[2].set(pool[1]))
    chex.assert_trees_all_equal(y[1, 2:], x[1, 2:])
    twice = lib.replace_tokens(x.at[:, 2].set(x[:, 0]), pool, jnp.array([[0, 2]] * 2))
    assert (twice[:, 0] != twice[:, 2]).any(-1).all()  # though pool[3] is the nearest to both


def test_the_pool_learns_where_it_is_used():
    pool, x = jax.random.normal(KEY, (5, 8)), jax.random.normal(jax.random.key(1), (1, 4, 8))
    loss = lambda pool: lib.reconstruction_loss(lib.replace_tokens(x, pool, order), x)
    order = jnp.array([[1, 3]])
    grad = jax.jit(jax.grad(loss))(pool)
    assert grad.any(-1).sum() == 2
    assert loss(pool - 0.01 * grad) < loss(pool)


def test_loss_is_quadratic_for_small_errors_and_linear_for_large_ones():
    loss = lambda e: lib.reconstruction_loss(jnp.full((1, 2, 3), e), jnp.zeros((1, 2, 3)))
    np.testing.assert_allclose([loss(0.005), loss(-0.005)], 10 * 0.005**2 / 0.02, rtol=1e-5)
    np.testing.assert_allclose([loss(1.0), loss(-2.0)], [9.95, 19.95], rtol=1e-5)
    x, y = jax.random.normal(KEY, (2, 1, 2, 3))
    assert not jax.grad(lib.reconstruction_loss, 1)(y, x).any()
