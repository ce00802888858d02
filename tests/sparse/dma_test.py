"""Only what is particular to dynamic mask attention; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import dma as lib
from tests import cost
from tests.sparse import helpers


def example(T):
    return *helpers.example(T), helpers.normal(2, T, 2, seed=1)


def near(q, k, v, score):
    """By the window of 5 best keys, and by one of the last 5."""
    near = ops.dot_product_attention(q, k, v, mask=masks.Window(4))
    return lib.dma(q, k, v, score, window=5), near


def test_all_keys_are_full_attention_with_a_bias_of_keys():
    def full(q, k, v, score):
        bias = jnp.repeat(score, 2, 2).swapaxes(1, 2)[:, :, None]
        return ops.dot_product_attention(q, k, v, mask=masks.Causal(), bias=bias)

    both = helpers.program(lambda *args: (lib.dma(*args, window=23), full(*args)))
    chex.assert_trees_all_close(*both(*example(23)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [7, 70])
def test_agrees_with_the_oracle_over_several_chunks(window):
    """With a window that is less than a chunk, and one of more keys than the first holds."""
    fn, oracle = (functools.partial(f, window=window) for f in (lib.dma, lib.SPEC.oracle))
    helpers.assert_same(fn, oracle, example(150))


def test_equal_scores_are_a_sliding_window():
    q, k, v, score = example(100)
    actual, expected = helpers.program(near)(q, k, v, np.zeros_like(score))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_choice_is_of_the_past_alone():
    """The highest scores of all, in the future, must drop nothing."""
    args = example(100)
    later = [np.concatenate([x[:, :50], np.full_like(x[:, 50:], 100.0)], 1) for x in args]
    run = lambda args: helpers.program(near)(*args)[0]
    chex.assert_trees_all_close(run(later)[:, :50], run(args)[:, :50], atol=1e-6)


def test_holds_what_matters_however_far_it_is():
    """One token whose value marks it is read all the way, by a window of 5 of 100."""
    q, k, v, _ = (np.zeros_like(x) for x in example(100))
    v[:, 3, :, 0] = 10.0
    weight = np.zeros((2, 8, 2), np.float32)
    weight[:, 0] = 0.5
    score = helpers.program(lib.key_scores)(v, weight, np.ones(2, np.float32))
    expected = np.log(1 + np.exp(np.array([10.0, 0.0], np.float32)))
    chex.assert_trees_all_close(score[0, 3:5, 0], expected, rtol=1e-5)
    o, last = (x[0, :, 0, 0] for x in helpers.program(near)(q, k, v, score))
    assert (o[4:] > 9.9).all() and not last[8:].any()


def test_key_heads_choose_for_themselves():
    matrix = helpers.program(functools.partial(edit.matrix, lib.dma), window=3)
    seen = matrix(*example(20)) > 0
    chex.assert_trees_all_equal(seen[:, ::2], seen[:, 1::2])
    assert not (seen[:, 0] == seen[:, 2]).all() and (seen[:, :, 2:].sum(-1) == 3).all()


@pytest.mark.parametrize("window, amount", [(4, 1.0), (4, 0.0), (40, 1.0)])  # 0: all scores equal
def test_streams_from_a_state_of_no_more_than_the_window(window, amount):
    options = dict(num_heads=4, num_kv_heads=2, head_dim=8, window=window)
    module, x = lib.Dma(**options, rotary_base=100.0), helpers.normal(2, 23, 16)

    def change(params):
        params["params"]["amount"]["table"] *= amount
        return params

    state = helpers.assert_streams(module, x, (7,), 30, change)
    assert state.k.shape == (2, min(window, 30), 2, 8) and state.length == 23


def test_costs_less_than_full_attention():
    def count(fn, *rest):
        args = [jax.ShapeDtypeStruct((1, 8192, 1, 64), jnp.float32)] * 3
        return cost.operations(jax.grad(lambda *x: fn(*x).sum(), (0, 1, 2)), *args, *rest)

    full = functools.partial(ops.dot_product_attention, implementation="dense")
    few = functools.partial(lib.dma, window=128)
    assert count(few, jax.ShapeDtypeStruct((1, 8192, 1), jnp.float32)) < count(full) / 8


def test_refuses_what_it_cannot_do():
    args = [jnp.asarray(x) for x in example(6)]
    with pytest.raises(NotImplementedError, match="dma can't honour Window"):
        lib.dma(*args, mask=masks.Window(2))
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        lib.dma(*args, window=0)
    with pytest.raises(ValueError, match="T=6 at most S=3"):
        lib.dma(args[0], *(x[:, :3] for x in args[1:]))
