import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import moba
from tests import cost

KEY = jax.random.key(0)


def example(T, N=4, K=2, H=8):
    q, k, v = jax.random.normal(KEY, (3, 2, T, N, H))
    return q, k[:, :, :K], v[:, :, :K]


def assert_same(fn, other, args):
    def both(fn):
        out, pull = jax.vjp(fn, *args)
        return out, pull(jnp.cos(out))

    actual, expected = jax.jit(lambda: (both(fn), both(other)))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block, topk", [(5, 5), (64, 1)])
def test_all_blocks_are_full_attention(block, topk):
    full = functools.partial(ops.dot_product_attention, mask=masks.Causal())
    assert_same(functools.partial(moba.moba, block=block, topk=topk), full, example(23))


def test_one_block_is_always_the_current_one():
    local = masks.Causal() & masks.Segments(jnp.arange(23)[None].repeat(2, 0) // 5)
    full = functools.partial(ops.dot_product_attention, mask=local)
    assert_same(functools.partial(moba.moba, block=5, topk=1), full, example(23))


def test_finds_the_block_that_full_attention_looks_at():
    v = example(64, N=1, K=1)[2]
    own = jax.nn.one_hot(jnp.arange(64) // 8, 8)[None, :, None].repeat(2, 0)  # of each block
    q = 40 * jnp.roll(own, 8, 1)  # a block looks for the one before it
    run = lambda **options: jax.jit(functools.partial(moba.moba, block=8, **options))(q, own, v)
    full = ops.dot_product_attention(q, own, v, mask=masks.Causal())
    error = lambda topk: jnp.abs(run(topk=topk) - full)[:, 8:].max()
    assert error(2) < 1e-4 and error(1) > 0.5


def test_costs_less_than_full_attention():
    def count(fn, T):
        loss = lambda *x: fn(*x).sum()
        return cost.operations(jax.grad(loss, (0, 1, 2)), *jax.eval_shape(lambda: example(T, H=32)))

    few = functools.partial(moba.moba, block=64)
    full = functools.partial(ops.dot_product_attention, implementation="dense")
    assert count(few, 4096) < count(full, 4096) / 8
    assert count(few, 4096) < 2.3 * count(few, 2048)  # the gate alone is quadratic


def test_padding_changes_nothing():
    args = example(11)
    run = jax.jit(functools.partial(moba.moba, block=4, topk=2))
    padded = [jnp.pad(x, ((0, 0), (0, 5), (0, 0), (0, 0)), constant_values=9.0) for x in args]
    valid = masks.Valid(jnp.arange(16)[None].repeat(2, 0) < 11)
    actual = run(*padded, mask=valid)[:, :11]
    chex.assert_trees_all_close(actual, run(*args), rtol=1e-5, atol=1e-5)


def test_hidden_keys_count_in_no_mean_and_an_empty_block_is_not_chosen():
    q, k, v = jnp.ones((1, 8, 1, 2)), -jnp.ones((1, 8, 1, 2)), jnp.arange(8.0).reshape(1, 8, 1, 1)
    k = k.at[:, 2].set(-2.0).at[:, 3].set(9.0)  # block 1 would be best by its hidden key 3
    valid = masks.Valid(jnp.array([[True, True, True, False, False, False, True, True]]))
    o = jax.jit(functools.partial(moba.moba, block=2, topk=2))(q, k, v, mask=valid)
    chex.assert_trees_all_close(o[0, 7, 0, 0], (0 + 1 + 6 + 7) / 4)


def test_streams_into_a_longer_cache():
    module = moba.MoBA(num_heads=2, head_dim=8, block=4, topk=2, rotary_base=100.0)
    x = jax.random.normal(KEY, (2, 11, 16))

    @jax.jit
    def both(x):
        y, params = module.init_with_output(KEY, x)
        state, ys = module.apply(params, 2, 30, method="init_state"), []
        for piece in jnp.split(x, (6, 7), 1):
            state, part = module.apply(params, state, piece, method="extend")
            ys.append(part)
        return y, jnp.concatenate(ys, 1)

    chex.assert_trees_all_close(*both(x), rtol=1e-5, atol=1e-5)


def test_a_step_reads_only_the_blocks_that_it_chooses():
    _, k, v = example(20)
    q, means = jnp.ones((2, 1, 4, 8)), jnp.zeros((2, 5, 2, 8)).at[:, 1].set(1.0)
    unread = jnp.isin(jnp.arange(20) // 4, jnp.array([1, 4]), invert=True)[None, :, None, None]
    run = jax.jit(functools.partial(moba.moba, q, means=means, block=4, topk=2, q_offset=19))
    chex.assert_trees_all_equal(run(*(jnp.where(unread, jnp.nan, x) for x in (k, v))), run(k, v))


def test_refuses_what_it_cannot_do():
    args = example(6)
    for mask in (masks.Window(2), masks.Segments(jnp.zeros((2, 6), int))):
        with pytest.raises(NotImplementedError, match="moba can't honour"):
            moba.moba(*args, mask=mask)
    for options in (dict(block=0), dict(topk=0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            moba.moba(*args, **options)
