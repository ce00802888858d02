"""Only what is particular to SpargeAttn; the rest is tests/conformance_test.py."""

import functools

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks
from attnjax.softmax import multi_head_attention as mha
from attnjax.sparse import spargeattn as lib
from tests.initial import initial
from tests.sparse import helpers

C, L = 8, 8  # tokens of a block, blocks
T = C * L
SIZES = dict(block_q=C, block_k=C)


def clustered(scale=24.0):
    """Tokens of a block are alike; block i looks at the blocks i and 3 i modulo 8."""
    number = np.arange(T) // C
    own, other = (helpers.one_hot(x, L) for x in (number, 3 * number % L))
    noise = 0.1 * helpers.normal(2, T, L)
    q, k = np.float32(scale) * (own + other) + noise[0], own + noise[1]
    return q[None, :, None], k[None, :, None], helpers.normal(1, T, 1, 8, seed=1)


def select(q, k, **options):
    return helpers.program(lib.select, **(SIZES | dict(causal=False) | options))(q, k)


def run(*args, **options):
    return helpers.program(lib.spargeattn, **(SIZES | options))(*args)


def error(q, k, v, seen):
    return helpers.error(q, k, v, helpers.tokens(seen, C), is_causal=False)


@pytest.mark.parametrize("mask, drop", [(None, None), (None, -1e9), (masks.Causal(), -1e9)])
def test_the_whole_mass_and_no_drop_is_attention(mask, drop):
    q, k, v = helpers.example(61)
    w = helpers.weights(q, k, is_causal=mask is not None)
    full = np.einsum("BNTS,BSNV->BTNV", w, np.repeat(v, 2, 2))
    o = run(q, k, v, mask=mask, tau=1.0, drop=drop)
    chex.assert_trees_all_close(o, full, rtol=1e-5, atol=1e-6)


def test_clusters_need_few_blocks():
    q, k, v = clustered()
    selected = select(q, k, tau=0.9)
    i = np.arange(L)
    assert selected[0, 0, i, i].all() and selected[0, 0, i, 3 * i % L].all()
    assert selected.mean() < 0.3
    full = (helpers.weights(q, k, is_causal=False)[0, 0] @ v[0, :, 0])[None, :, None]
    size, o = np.abs(full).mean(), run(q, k, v, tau=0.9, drop=-8.0)
    assert np.abs(o - full).mean() < 0.05 * size
    draw = np.random.default_rng(0)
    for _ in range(10):  # a random choice of as many
        others = draw.permutation(selected.ravel()).reshape(selected.shape)
        others[..., 0] |= ~others.any(-1)  # of nothing there is no mean
        assert error(q, k, v, others) > 0.5 * size


def test_more_mass_is_more_blocks_and_less_error():
    q, k, v = clustered(6.0)
    few, some, every = (select(q, k, tau=tau) for tau in (0.2, 0.9, 1.0))
    assert few.sum() < some.sum() < every.sum() == L * L
    assert error(q, k, v, few) > error(q, k, v, some) > error(q, k, v, every)


def test_a_mean_that_says_nothing_is_not_trusted():
    """Block 5 holds keys that cancel, among them the one that all queries look for."""
    q, k, _ = clustered()
    k[0, 5 * C : 6 * C, 0] = 2 * np.repeat((np.arange(C) - C / 2 + 0.5)[:, None], L, 1)
    q[:, : 7 * C] = 20.0
    assert not select(q, k, tau=0.3, theta=-1.0)[0, 0, :5, 5].any()
    assert select(q, k, tau=0.3)[0, 0, :, 5].all()
    q[:, 2 * C : 2 * C + C // 2] *= -1.0  # queries that cancel look everywhere
    assert select(q, k, tau=0.3)[0, 0, 2].all()


def test_similarity_is_the_mean_cosine_of_all_pairs():
    x = helpers.normal(2, 10, 3, 4)
    y = x / np.linalg.norm(x, axis=-1, keepdims=True)
    cosine = np.einsum("BTNH,BSNH->BTSN", y, y)
    expected = np.stack([cosine[:, :8, :8].mean((1, 2)), cosine[:, 8:, 8:].mean((1, 2))], 1)
    chex.assert_trees_all_close(helpers.program(lib.similarity, block=8)(x), expected, atol=1e-5)


def test_a_vector_common_to_all_keys_changes_nothing():
    q, k, v = clustered()
    sign = np.where((np.arange(T) // C == 5) & (np.arange(T) % 2 == 0), -1.0, 1.0)
    k = k * sign[None, :, None, None]  # the keys of block 5 cancel, so that all read it
    # eighths, in 16 features for a scale of 1/4: then scores of hundreds are exact, too
    exact = lambda x: np.pad(np.round(8 * x) / 8, ((0, 0),) * 3 + ((0, 16 - L),))
    q, k, shift = (exact(x).astype(np.float32) for x in (q, k, 9 * helpers.normal(1, 1, 1, L)))
    both = helpers.program(chosen_and_attended)
    chosen, o = both(q, k, v)
    assert chosen[0, 0, :, 5].all()
    shifted, other = both(q, k + shift, v)
    chex.assert_trees_all_equal(shifted, chosen)
    chex.assert_trees_all_close(other, o, rtol=1e-5, atol=1e-6)


def chosen_and_attended(q, k, v):
    chosen = lib.select(q, k, causal=False, tau=0.5, **SIZES)
    return chosen, lib.spargeattn(q, k, v, **SIZES)


def test_the_second_filter_changes_little_and_skips_values():
    q, k, v = clustered()
    full, few = (run(q, k, v, tau=1.0, drop=drop) for drop in (-1e9, -3.0))
    chex.assert_trees_all_close(few, full, atol=C * L * np.exp(-3.0))
    k[:, :C] = 9.0  # block 0 is seen first, and block 6 is far below for every query
    k[:, 6 * C : 7 * C] = -9.0
    v[:, 6 * C : 7 * C] = np.nan
    assert np.isfinite(run(np.abs(q), k, v, tau=1.0, drop=-3.0)).all()
    assert np.isnan(run(np.abs(q), k, v, tau=1.0, drop=-1e9)).any()


def test_a_block_that_no_query_chose_is_not_read():
    tokens = 640  # more than the dense implementation takes
    own = helpers.one_hot(np.arange(tokens) // 64, 10)[None, :, None]
    q, k = 40 * own, own
    q[:, 128:192] = 40 * own[:, :64]
    v = np.where(np.arange(tokens) // 64 == 2, np.float32(np.nan), 1)[None, :, None, None]
    o = run(q, k, v.astype(np.float32), block_q=64, block_k=64, tau=0.9)
    chex.assert_trees_all_close(o, np.ones_like(o), rtol=1e-5)


def test_no_query_is_left_without_a_key_and_none_sees_a_later_one():
    options = dict(mask=masks.Causal(), tau=0.0, theta=-1.0, block_q=16, block_k=4)
    matrix = functools.partial(edit.matrix, lib.spargeattn)
    w = helpers.program(matrix, **options)(*helpers.example(45))
    chex.assert_trees_all_close(w.sum(-1), np.ones_like(w[..., 0]), rtol=1e-5)
    assert w[:, :, 20, :21].any() and not np.triu(w, 1).any()


def test_is_a_function_of_multi_head_attention():
    few = functools.partial(lib.spargeattn, tau=0.0, theta=-1.0, block_q=4, block_k=4)
    module, x = mha.MultiHeadAttention(num_heads=2, head_dim=8), helpers.normal(2, 12, 16)

    def outputs(params, x):
        causal, sparse = masks.Causal(), module.clone(fn=few)
        state = module.apply(params, 2, 12, method="init_state")
        _, steps = sparse.apply(params, state, x, method="extend")
        return module.apply(params, x, mask=causal), sparse.apply(params, x, mask=causal), steps

    params = initial(module.init, helpers.KEY, x)
    full, sparse, steps = helpers.program(outputs)(params, x)
    chex.assert_trees_all_close(steps, full, rtol=1e-5, atol=1e-6)
    assert np.abs(sparse - full).max() > 1e-2
    chex.assert_trees_all_close(sparse[:, :4], full[:, :4], rtol=1e-5, atol=1e-6)


def test_refuses_what_it_cannot_do():
    q, k, v = (jnp.asarray(x) for x in helpers.example(6))
    with pytest.raises(NotImplementedError, match="spargeattn can't honour Window"):
        lib.spargeattn(q, k, v, mask=masks.Window(2))
    for options in (dict(tau=1.1), dict(theta=-2.0), dict(block_q=0), dict(block_k=0)):
        with pytest.raises(ValueError, match="must be in"):
            lib.spargeattn(q, k, v, **options)
    with pytest.raises(ValueError, match="drop=1.0 must be at most 0"):
        lib.spargeattn(q, k, v, drop=1.0)
