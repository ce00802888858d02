import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import moba
from tests import cost
from tests.sparse import helpers

NAN = np.float32(np.nan)


def test_all_blocks_are_full_attention():
    """Blocks of 5 of 23 tokens, and one that is longer than all."""
    args = helpers.example(23)
    for options in (dict(block=5, topk=5), dict(block=64, topk=1)):
        actual = helpers.program(moba.moba, **options)(*args)
        chex.assert_trees_all_close(actual, helpers.causal(*args), rtol=1e-5, atol=1e-5)


def test_one_block_is_always_the_current_one():
    def local(q, k, v):
        own = masks.Segments(jnp.arange(23)[None].repeat(2, 0) // 5)
        return ops.dot_product_attention(q, k, v, mask=masks.Causal() & own)

    fn = functools.partial(moba.moba, block=5, topk=1)
    helpers.assert_same(fn, local, helpers.example(23))


def test_finds_the_block_that_full_attention_looks_at():
    v = helpers.normal(1, 64, 1, 8)
    own = helpers.one_hot(np.arange(64) // 8, 8)[None, :, None]  # of each block
    q = 40 * np.roll(own, 8, 1)  # a block looks for the one before it
    full = helpers.causal(q, own, v)
    run = lambda topk: helpers.program(moba.moba, block=8, topk=topk)(q, own, v)
    error = lambda topk: np.abs(run(topk) - full)[:, 8:].max()
    assert error(2) < 1e-4 and error(1) > 0.5


def test_costs_less_than_full_attention():
    def count(fn, T):
        loss = lambda *x: fn(*x).sum()
        shapes = [jax.ShapeDtypeStruct((2, T, N, 32), jnp.float32) for N in (4, 2, 2)]
        return cost.operations(jax.grad(loss, (0, 1, 2)), *shapes)

    few = functools.partial(moba.moba, block=64)
    full = functools.partial(ops.dot_product_attention, implementation="dense")
    assert count(few, 4096) < count(full, 4096) / 8
    assert count(few, 4096) < 2.3 * count(few, 2048)  # the gate alone is quadratic


def test_padding_changes_nothing():
    """Nor do padded keys count in a mean; here and there in one program, by lengths of both."""

    def run(q, k, v, valid):
        masked = moba.moba(q, k, v, mask=masks.Valid(valid), block=4, topk=2)
        return masked[:, :11], moba.moba(*(x[:, :11] for x in (q, k, v)), block=4, topk=2)

    pad = lambda x: np.pad(x, ((0, 0), (0, 5), (0, 0), (0, 0)), constant_values=9.0)
    valid = np.arange(16)[None].repeat(2, 0) < 11
    both = helpers.program(run)(*map(pad, helpers.example(11)), valid)
    chex.assert_trees_all_close(*both, rtol=1e-5, atol=1e-5)


def test_hidden_keys_count_in_no_mean_and_an_empty_block_is_not_chosen():
    q, v = np.ones((1, 8, 1, 2), np.float32), np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1)
    k = -q
    k[:, 2], k[:, 3] = -2.0, 9.0  # block 1 would be best by its hidden key 3
    valid = np.array([[True, True, True, False, False, False, True, True]])
    run = lambda *args: moba.moba(*args[:3], mask=masks.Valid(args[3]), block=2, topk=2)
    o = helpers.program(run)(q, k, v, valid)
    chex.assert_trees_all_close(o[0, 7, 0, 0], np.float32((0 + 1 + 6 + 7) / 4))


def test_streams_into_a_longer_cache():
    module = moba.MoBA(num_heads=2, head_dim=8, block=4, topk=2, rotary_base=100.0)
    helpers.assert_streams(module, helpers.normal(2, 15, 16), (7,), 30)


def test_a_step_reads_only_the_blocks_that_it_chooses():
    _, k, v = helpers.example(20)
    q, means = np.ones((2, 1, 4, 8), np.float32), np.zeros((2, 5, 2, 8), np.float32)
    means[:, 1] = 1.0
    unread = np.isin(np.arange(20) // 4, [1, 4], invert=True)[None, :, None, None]
    fn = lambda q, k, v, means: moba.moba(q, k, v, means=means, block=4, topk=2, q_offset=19)
    run = lambda k, v: program(q, k, v, means)
    program = helpers.program(fn)
    hidden = (np.where(unread, NAN, x) for x in (k, v))
    chex.assert_trees_all_equal(run(*hidden), run(k, v))


def test_refuses_what_it_cannot_do():
    args = [jnp.asarray(x) for x in helpers.example(6)]
    for mask in (masks.Window(2), masks.Segments(jnp.zeros((2, 6), int))):
        with pytest.raises(NotImplementedError, match="moba can't honour"):
            moba.moba(*args, mask=mask)
    for options in (dict(block=0), dict(topk=0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            moba.moba(*args, **options)
