"""Only what is particular to HiP attention; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import hip_attention as lib
from tests import cost
from tests.sparse import helpers


def smooth(T=512, H=16):
    """Queries that look for a place of their own, and keys that change slowly along the places."""
    place = np.random.default_rng(0).uniform(size=T)
    width = np.linspace(0, 1, H)[None]
    bump = lambda x: np.exp(-((x[:, None] - width) ** 2) / 0.02).astype(np.float32)
    q, k = 30 * bump(place * np.arange(T) / T), bump(np.arange(T) / T)
    return q[None, :, None], k[None, :, None]


def of_all(q, k, *, budget, block_q, block_k):
    """The blocks of keys that each block of queries chooses (I A); those of the first head."""
    first = jnp.arange(0, q.shape[1], block_q)

    def one(first):
        rows = jax.lax.dynamic_slice_in_dim(q, first, block_q, 1)
        return lib.search(rows, k, first + jnp.arange(block_q), budget=budget, block_k=block_k)

    return jax.lax.map(one, first)[:, 0, 0]


def chosen(q, k, **options):
    """(T, S) whether a query reads a key, by the search of its block."""
    blocks, T = helpers.program(of_all, **options)(q, k), q.shape[1]
    number = np.arange(T) // options["block_k"]
    rows = (blocks[..., None] == number[None, None]).any(1)
    return rows.repeat(options["block_q"], 0) & np.tri(T, dtype=bool)


def recall(w, seen):
    return np.where(seen, w, 0).sum(-1).mean()


@pytest.mark.parametrize("T", [7, 61])
def test_a_budget_of_all_keys_is_full_attention(T):
    args = helpers.example(T)
    o = helpers.program(lib.hip_attention, budget=64, block_q=8, block_k=4)(*args)
    chex.assert_trees_all_close(o, helpers.causal(*args), rtol=1e-5, atol=1e-6)


def test_finds_the_keys_of_a_smooth_sequence():
    q, k = smooth()
    w, sizes = helpers.weights(q, k)[0, 0], dict(block_q=1, block_k=2)
    seen = [chosen(q, k, budget=n, **sizes) for n in (16, 64, 256)]
    found = [recall(w, x) for x in seen]
    assert found == sorted(found) and found[1] > 0.9 and found[2] > 0.99
    noise = np.where(np.tri(512, dtype=bool), np.random.default_rng(1).uniform(size=w.shape), 0)
    at_random = np.argsort(np.argsort(-noise)) < seen[1].sum(-1, keepdims=True)
    assert found[1] > recall(w, at_random) + 0.2


def test_finds_a_block_that_stands_out_at_its_centre():
    k, q = np.zeros((1, 256, 1, 2), np.float32), np.ones((1, 4, 1, 2), np.float32)
    k[0, 64:128, 0, 0], k[0, 98:102, 0, 0] = 1.0, 2.0
    q[0, :3] = -1.0  # one query of the block is enough
    search = helpers.program(lib.search, budget=32, block_k=2)
    blocks = search(q, k, np.arange(252, 256))[0, 0]
    assert np.isin([0, 49, 50, 126, 127], blocks).all()
    assert ((blocks >= 32) & (blocks < 64)).sum() == 16 - 3  # the rest of the budget is near it
    assert len(np.unique(blocks)) == 16


def test_every_query_keeps_the_first_key_and_its_own_block_and_sees_no_later_one():
    q, k, v = helpers.example(67)
    options = dict(budget=12, block_q=5, block_k=2)
    seen = chosen(q[:, :65, :1], k[:, :65, :1], **options)
    t = np.arange(65)
    assert seen[:, 0].all() and seen[t, t].all() and seen[t[1:] // 5 * 5, t[1:] // 5 * 5].all()
    assert (seen.sum(-1) <= 12).all() and len(np.unique(seen.sum(-1)[13:])) > 1
    w = helpers.program(functools.partial(edit.matrix, lib.hip_attention), **options)(q, k, v)
    chex.assert_trees_all_close(w.sum(-1), np.ones_like(w[..., 0]), rtol=1e-5)
    assert w[:, :, 30, :31].any() and not np.triu(w, 1).any()


def test_costs_little_more_than_linear():
    def count(T):
        q = jax.ShapeDtypeStruct((1, T, 1, 32), jnp.float32)
        return cost.operations(functools.partial(lib.hip_attention, budget=128), q, q, q)

    full = functools.partial(ops.dot_product_attention, implementation="dense")
    q = jax.ShapeDtypeStruct((1, 8192, 1, 32), jnp.float32)
    assert count(8192) < cost.operations(full, q, q, q) / 8
    rounds = [count(2 * T) / T - 2 * count(T) / T for T in (512, 1024, 2048, 4096)]
    assert min(rounds) > 0 and max(rounds) < 1.05 * min(rounds)  # one round more each


def test_single_queries_stream():
    module = lib.HipAttention(2, 8, rotary_base=100.0, budget=6, block_q=1, block_k=1)
    helpers.assert_streams(module, helpers.normal(2, 23, 16), (15,), 24)


def test_refuses_what_it_cannot_do():
    q, k, v = (jnp.asarray(x) for x in helpers.example(6))
    with pytest.raises(NotImplementedError, match="hip_attention can't honour Window"):
        lib.hip_attention(q, k, v, mask=masks.Window(2))
    for options in (dict(block_q=0), dict(block_k=0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            lib.hip_attention(q, k, v, **options)
    for options in (dict(budget=37), dict(budget=36, block_q=32)):
        with pytest.raises(ValueError, match="budget=3. must be a multiple of"):
            lib.hip_attention(q, k, v, **options)
