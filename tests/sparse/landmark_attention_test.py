"""Only what is particular to landmark attention; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import landmark_attention as lib
from tests import cost
from tests.sparse import helpers

NAN = np.float32(np.nan)


def run(*args, **options):
    return helpers.program(lib.landmark_attention, **options)(*args)


def example(T=14):
    return helpers.example(T)


def weights(q, k, v, valid, topk):
    """Of the keys that are valid."""
    options = dict(block=4, topk=topk, mask=masks.Valid(valid))
    return edit.matrix(lib.landmark_attention, q, k, v, **options)


def grouped_softmax(x, block, topk):
    """The weights of one head, query by query and group by group; topk=None is all."""
    T = len(x)
    w = np.zeros((T, T))
    for t in range(T):
        start = t // block * block
        own = [s for s in range(start, t + 1) if s % block != block - 1]
        marks = sorted(range(block - 1, start, block), key=lambda s: -x[t, s])[:topk]
        first = np.exp(x[t, own + marks])
        first /= first.sum()
        w[t, own] = first[: len(own)]
        for mark, weight in zip(marks, first[len(own) :], strict=True):
            words = slice(mark - block + 1, mark)
            w[t, words] = weight * np.exp(x[t, words]) / np.exp(x[t, words]).sum()
    return w


@pytest.mark.parametrize("topk", [1, 3, None])  # one of three blocks, and all
def test_weights_are_the_grouped_softmax(topk):
    q, k, v = example()
    w = helpers.program(weights, topk=topk)(q, k, v, np.ones((2, 14), bool))
    x = np.einsum("BTNH,BSNH->BNTS", q, np.repeat(k, 2, 2)) / np.sqrt(8)
    expected = np.stack([[grouped_softmax(m, 4, topk) for m in row] for row in x])
    chex.assert_trees_all_close(w, expected.astype(np.float32), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(w.sum(-1), np.ones_like(w[..., 0]), rtol=1e-5)
    assert not w[..., 3::4].any()


def test_one_block_is_attention():
    args = example()
    actual = run(*args, block=15)
    chex.assert_trees_all_close(actual, helpers.causal(*args), rtol=1e-5, atol=1e-6)


def test_a_landmark_leads_to_its_block_in_a_long_text():
    """A passkey, found with topk=1 four times as far away as in a text of 32 tokens."""
    T, C = 128, 8
    name = helpers.one_hot(np.arange(T) // C, 16)  # a landmark knows what its block is about
    k = np.where((np.arange(T) % C == C - 1)[:, None], 40 * name, 0)
    passkey = 5 * C + 2
    k[passkey] = 40 * name[passkey]
    v = helpers.one_hot(np.arange(T), T)[None, :, None]
    q = np.broadcast_to(name[passkey], (1, T, 1, 16))
    w = run(q, k[None, :, None], v, block=C, topk=1)[0, :, 0]
    assert (w[6 * C :, passkey] > 0.99).all() and not w[: passkey - 2].any(0)[passkey]


def test_costs_less_than_attention_to_all():
    def count(fn, T):
        loss = lambda *x: fn(*x).sum()
        q = jax.ShapeDtypeStruct((1, T, 1, 64), jnp.float32)
        return cost.operations(jax.grad(loss, (0, 1, 2)), q, q, q)

    full = functools.partial(ops.dot_product_attention, implementation="dense")
    assert count(lib.landmark_attention, 4096) < count(full, 4096) / 4
    assert count(lib.landmark_attention, 4096) < 2.2 * count(lib.landmark_attention, 2048)


def test_a_hidden_landmark_hides_its_block_and_a_hidden_word_only_itself():
    q, k, v = example()
    hiding = lambda at: ~np.isin(np.arange(14), at)[None].repeat(2, 0)
    run = helpers.program(weights, topk=None)
    w = run(q, k, v, hiding([3, 5]))
    assert not w[:, :, 4:, :4].any() and not w[..., 5].any()
    assert (w[:, :, 8:, (4, 6)] > 0).all()
    chex.assert_trees_all_close(w.sum(-1), np.ones_like(w[..., 0]), rtol=1e-5)
    w = run(q, k, v, hiding([0, 1, 2]))  # a landmark of nothing
    chex.assert_trees_all_close(w[:, :, 4:].sum(-1), np.ones_like(w[:, :, 4:, 0]), rtol=1e-5)
    assert not w[:, :, :4].any()


def test_streams_into_a_longer_cache():
    options = dict(num_heads=2, head_dim=8, block=4, topk=2, rotary_base=100.0)
    module = lib.LandmarkAttention(**options)
    helpers.assert_streams(module, helpers.normal(2, 19, 16), (7,), 30)


def test_a_step_reads_landmarks_and_only_the_blocks_that_it_retrieves():
    _, k, v = example(22)
    k[:, 3::4], k[:, 11], q = -1.0, 1.0, np.ones((2, 1, 4, 8), np.float32)
    read = np.isin(np.arange(22) // 4, [2, 5])
    hide = lambda x, kept: np.where(kept[None, :, None, None], x, NAN)
    options = dict(block=4, topk=1, q_offset=21)
    unread = hide(k, read | (np.arange(22) % 4 == 3)), hide(v, read)
    chex.assert_trees_all_equal(run(q, *unread, **options), run(q, k, v, **options))


def test_refuses_what_it_cannot_do():
    args = [jnp.asarray(x) for x in example()]
    for mask in (masks.Window(2), masks.Segments(jnp.zeros((2, 14), int))):
        with pytest.raises(NotImplementedError, match="landmark_attention can't honour"):
            lib.landmark_attention(*args, mask=mask)
    for options in (dict(block=1), dict(topk=0)):
        with pytest.raises(ValueError, match="must be at least"):
            lib.landmark_attention(*args, **options)
