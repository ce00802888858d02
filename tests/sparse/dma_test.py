"""Only what is particular to dynamic mask attention; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import edit, masks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import dma as lib
from tests import cost

KEY = jax.random.key(0)


def example(T):
    return list(lib.SPEC.example(KEY, T).values())


def assert_same(fn, other, args):
    def both(fn):
        out, pull = jax.vjp(fn, *args)
        return out, pull(jnp.cos(out))

    actual, expected = jax.jit(lambda: (both(fn), both(other)))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_all_keys_are_full_attention_with_a_bias_of_keys():
    def full(q, k, v, score):
        bias = jnp.repeat(score, 2, 2).swapaxes(1, 2)[:, :, None]
        return ops.dot_product_attention(q, k, v, mask=masks.Causal(), bias=bias)

    assert_same(functools.partial(lib.dma, window=23), full, example(23))


@pytest.mark.parametrize("window", [2, 7, 70])
def test_agrees_with_the_oracle_over_several_chunks(window):
    fn, oracle = (functools.partial(f, window=window) for f in (lib.dma, lib.SPEC.oracle))
    assert_same(fn, oracle, example(150))


def test_equal_scores_are_a_sliding_window():
    q, k, v, score = example(80)
    near = ops.dot_product_attention(q, k, v, mask=masks.Window(4))
    actual = lib.dma(q, k, v, jnp.zeros_like(score), window=5)
    chex.assert_trees_all_close(actual, near, rtol=1e-5, atol=1e-6)


def test_the_choice_is_of_the_past_alone():
    """The highest scores of all, in the future, must drop nothing."""
    *qkv, score = example(100)
    run = jax.jit(functools.partial(lib.dma, window=4))
    later = [x.at[:, 50:].set(100.0) for x in (*qkv, score)]
    chex.assert_trees_all_close(run(*later)[:, :50], run(*qkv, score)[:, :50], atol=1e-6)


def test_holds_what_matters_however_far_it_is():
    """One token whose value marks it is read all the way, by a window of 2 of 200."""
    v = jnp.zeros((1, 200, 1, 8)).at[:, 3, :, 0].set(10.0)
    q = k = jnp.zeros((1, 200, 1, 8))
    weight = jnp.zeros((1, 8, 1)).at[0, 0].set(1.0)
    score = lib.key_scores(v, weight, jnp.ones(1))
    chex.assert_trees_all_close(score[0, 3:5, 0], jnp.log(1 + jnp.exp(jnp.array([10.0, 0.0]))))
    o = lib.dma(q, k, v, score, window=2)[0, :, 0, 0]
    near = ops.dot_product_attention(q, k, v, mask=masks.Window(1))[0, :, 0, 0]
    assert (o[4:] > 9.9).all() and not near[5:].any()


def test_key_heads_choose_for_themselves():
    *qkv, score = example(20)
    seen = edit.matrix(lib.dma, *qkv, score, window=3) > 0
    chex.assert_trees_all_equal(seen[:, ::2], seen[:, 1::2])
    assert not (seen[:, 0] == seen[:, 2]).all() and (seen[:, :, 2:].sum(-1) == 3).all()


@pytest.mark.parametrize("window, amount", [(4, 1.0), (4, 0.0), (40, 1.0)])  # 0: all scores equal
def test_streams_from_a_state_of_no_more_than_the_window(window, amount):
    options = dict(num_heads=4, num_kv_heads=2, head_dim=8, window=window)
    module, x = lib.Dma(**options, rotary_base=100.0), jax.random.normal(KEY, (2, 23, 16))

    @jax.jit
    def both(x):
        params = module.init(KEY, x)
        params["params"]["amount"]["table"] *= amount
        y = module.apply(params, x)
        state, ys = module.apply(params, 2, 30, method="init_state"), []
        for piece in jnp.split(x, (7, 8), 1):
            state, part = module.apply(params, state, piece, method="extend")
            ys.append(part)
        return y, jnp.concatenate(ys, 1), state

    y, streamed, state = both(x)
    chex.assert_trees_all_close(streamed, y, rtol=1e-5, atol=1e-5)
    assert state.k.shape == (2, min(window, 30), 2, 8) and state.length == 23


def test_costs_less_than_full_attention():
    def count(fn, *rest):
        args = [jax.ShapeDtypeStruct((1, 8192, 1, 64), jnp.float32)] * 3
        return cost.operations(jax.grad(lambda *x: fn(*x).sum(), (0, 1, 2)), *args, *rest)

    full = functools.partial(ops.dot_product_attention, implementation="dense")
    few = functools.partial(lib.dma, window=128)
    assert count(few, jax.ShapeDtypeStruct((1, 8192, 1), jnp.float32)) < count(full) / 8


def test_refuses_what_it_cannot_do():
    args = example(6)
    with pytest.raises(NotImplementedError, match="dma can't honour Window"):
        lib.dma(*args, mask=masks.Window(2))
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        lib.dma(*args, window=0)
    with pytest.raises(ValueError, match="T=6 at most S=3"):
        lib.dma(args[0], *(x[:, :3] for x in args[1:]))
