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

KEY = jax.random.key(0)


def run(*args, **options):
    return jax.jit(functools.partial(lib.landmark_attention, **options))(*args)


def example(T=14):
    return lib.SPEC.example(KEY, T).values()


def grouped_softmax(x, block, topk):
    """The weights of one head, query by query and group by group."""
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


@pytest.mark.parametrize("topk", [1, 2, None])
def test_weights_are_the_grouped_softmax(topk):
    q, k, v = example()
    options = dict(block=4, topk=topk)
    w = jax.jit(lambda: edit.matrix(lib.landmark_attention, q, k, v, **options))()
    x = jnp.einsum("BTNH,BSNH->BNTS", q, jnp.repeat(k, 2, 2)) / np.sqrt(8)
    expected = np.stack([[grouped_softmax(np.asarray(m), 4, topk) for m in row] for row in x])
    chex.assert_trees_all_close(w, expected.astype(np.float32), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(w.sum(-1), jnp.ones(w.shape[:-1]), rtol=1e-5)
    assert not w[..., 3::4].any()


def test_all_blocks_retrieved_are_all_blocks():
    args = example()
    actual, all_ = run(*args, block=4, topk=3), run(*args, block=4, topk=None)
    chex.assert_trees_all_equal(actual, all_)


def test_one_block_is_attention():
    args = example()
    expected = ops.dot_product_attention(*args, mask=masks.Causal())
    chex.assert_trees_all_close(run(*args, block=15), expected, rtol=1e-5, atol=1e-6)


def test_a_landmark_leads_to_its_block_in_a_long_text():
    """A passkey, found with topk=1 four times as far away as in a text of 32 tokens."""
    T, C = 128, 8
    name = jax.nn.one_hot(jnp.arange(T) // C, 16)  # a landmark knows what its block is about
    k = jnp.where((jnp.arange(T) % C == C - 1)[:, None], 40 * name, 0)
    passkey = 5 * C + 2
    k = k.at[passkey].set(40 * name[passkey])[None, :, None]
    v = jax.nn.one_hot(jnp.arange(T), T)[None, :, None]
    q = jnp.broadcast_to(name[passkey], k.shape[1:3] + (16,))[None]
    w = run(q, k, v, block=C, topk=1)[0, :, 0]
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
    valid = jnp.ones((2, 14), bool).at[:, 3].set(False).at[:, 5].set(False)
    mask = masks.Valid(valid)
    fn = functools.partial(lib.landmark_attention, block=4, mask=mask)
    w = jax.jit(lambda: edit.matrix(fn, q, k, v))()
    assert not w[:, :, 4:, :4].any() and not w[..., 5].any()
    assert (w[:, :, 8:, (4, 6)] > 0).all()
    chex.assert_trees_all_close(w.sum(-1), jnp.ones(w.shape[:-1]), rtol=1e-5)
    empty = masks.Valid(jnp.ones((2, 14), bool).at[:, :3].set(False))  # a landmark of nothing
    w = jax.jit(lambda: edit.matrix(functools.partial(fn, mask=empty), q, k, v))()
    chex.assert_trees_all_close(w[:, :, 4:].sum(-1), jnp.ones((2, 4, 10)), rtol=1e-5)
    assert not w[:, :, :4].any()


def test_streams_into_a_longer_cache():
    options = dict(num_heads=2, head_dim=8, block=4, topk=2, rotary_base=100.0)
    module, x = lib.LandmarkAttention(**options), jax.random.normal(KEY, (2, 19, 16))

    @jax.jit
    def both(x):
        y, params = module.init_with_output(KEY, x)
        state, ys = module.apply(params, 2, 30, method="init_state"), []
        for piece in jnp.split(x, (6, 7, 16), 1):
            state, part = module.apply(params, state, piece, method="extend")
            ys.append(part)
        return y, jnp.concatenate(ys, 1)

    chex.assert_trees_all_close(*both(x), rtol=1e-5, atol=1e-5)


def test_a_step_reads_landmarks_and_only_the_blocks_that_it_retrieves():
    _, k, v = example(22)
    q, k = jnp.ones((2, 1, 4, 8)), k.at[:, 3::4].set(-1.0).at[:, 11].set(1.0)
    block = jnp.arange(22) // 4
    read = jnp.isin(block, jnp.array([2, 5]))
    hide = lambda x, kept: jnp.where(kept[None, :, None, None], x, jnp.nan)
    options = dict(block=4, topk=1, q_offset=21)
    unread = hide(k, read | (jnp.arange(22) % 4 == 3)), hide(v, read)
    chex.assert_trees_all_equal(run(q, *unread, **options), run(q, k, v, **options))


def test_refuses_what_it_cannot_do():
    args = example()
    for mask in (masks.Window(2), masks.Segments(jnp.zeros((2, 14), int))):
        with pytest.raises(NotImplementedError, match="landmark_attention can't honour"):
            lib.landmark_attention(*args, mask=mask)
    for options in (dict(block=1), dict(topk=0)):
        with pytest.raises(ValueError, match="must be at least"):
            lib.landmark_attention(*args, **options)
