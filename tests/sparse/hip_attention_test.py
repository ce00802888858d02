"""Only what is particular to HiP attention; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import hip_attention as lib
from tests import cost

KEY = jax.random.key(0)


def example(T):
    return lib.SPEC.example(KEY, T).values()


def smooth(T=512, H=16):
    """Queries that look for a place of their own, and keys that change slowly along the places."""
    place = jax.random.uniform(KEY, (T,))
    width = jnp.linspace(0, 1, H)[None]
    bump = lambda x: jnp.exp(-((x[:, None] - width) ** 2) / 0.02)
    q, k = 30 * bump(place * jnp.arange(T) / T), bump(jnp.arange(T) / T)
    return q[None, :, None], k[None, :, None]


def chosen(q, k, **options):
    """(T, S) whether a query reads a key, by the search of its block."""
    T, C = q.shape[1], options.pop("block_q")
    run = jax.jit(lambda q, t: lib.search(q, k, t, **options))
    rows = []
    for first in range(0, T, C):
        blocks = run(q[:, first : first + C], first + jnp.arange(C))[0, 0]
        rows.append(jnp.isin(jnp.arange(T) // options["block_k"], blocks)[None].repeat(C, 0))
    return jnp.concatenate(rows) & masks.dense(masks.Causal(), T, T)[0, 0]


def recall(q, k, seen):
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k)[0, 0] * q.shape[-1] ** -0.5
    w = jax.nn.softmax(jnp.where(masks.dense(masks.Causal(), *x.shape)[0, 0], x, -jnp.inf))
    return float(jnp.where(seen, w, 0).sum(-1).mean())


@pytest.mark.parametrize("T", [7, 61])
def test_a_budget_of_all_keys_is_full_attention(T):
    args = example(T)
    full = ops.dot_product_attention(*args, mask=masks.Causal())
    o = jax.jit(functools.partial(lib.hip_attention, budget=64, block_q=8, block_k=4))(*args)
    chex.assert_trees_all_close(o, full, rtol=1e-5, atol=1e-6)


def test_finds_the_keys_of_a_smooth_sequence():
    q, k = smooth()
    found = [recall(q, k, chosen(q, k, budget=n, block_q=1, block_k=2)) for n in (16, 64, 256)]
    assert found == sorted(found) and found[1] > 0.9 and found[2] > 0.99
    seen = chosen(q, k, budget=64, block_q=1, block_k=2)
    noise = jnp.where(masks.dense(masks.Causal(), 512, 512)[0, 0], jax.random.uniform(KEY), 0)
    noise = noise * jax.random.uniform(jax.random.key(1), noise.shape)
    at_random = jnp.argsort(jnp.argsort(-noise)) < seen.sum(-1, keepdims=True)
    assert recall(q, k, seen) > recall(q, k, at_random) + 0.2


def test_finds_a_block_that_stands_out_at_its_centre():
    k = jnp.zeros((1, 256, 1, 2)).at[0, 64:128, 0, 0].set(1.0).at[0, 98:102, 0, 0].set(2.0)
    q = jnp.ones((1, 4, 1, 2)).at[0, :3].set(-1.0)  # one query of the block is enough
    blocks = lib.search(q, k, jnp.arange(252, 256), budget=32, block_k=2)[0, 0]
    assert jnp.isin(jnp.array([0, 49, 50, 126, 127]), blocks).all()
    assert ((blocks >= 32) & (blocks < 64)).sum() == 16 - 3  # the rest of the budget is near it
    assert len(jnp.unique(blocks)) == 16


def test_every_query_keeps_the_first_key_and_its_own_block_and_sees_no_later_one():
    q, k, v = example(67)
    options = dict(budget=12, block_q=5, block_k=2)
    run = jax.jit(functools.partial(lib.hip_attention, **options))
    seen = chosen(q[:, :65, :1], k[:, :65, :1], **options)
    t = jnp.arange(65)
    assert seen[:, 0].all() and seen[t, t].all() and seen[t[1:] // 5 * 5, t[1:] // 5 * 5].all()
    assert (seen.sum(-1) <= 12).all() and len(jnp.unique(seen.sum(-1)[13:])) > 1
    ones = run(q, k, jnp.ones_like(v))
    chex.assert_trees_all_close(ones, jnp.ones_like(ones), rtol=1e-5)
    grad = jax.grad(lambda v: (run(q, k, v)[:, 30] ** 2).sum())(v)
    assert grad[:, :31].any() and not grad[:, 31:].any()


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
    x = jax.random.normal(KEY, (2, 24, 16))

    @jax.jit
    def both(x):
        y, params = module.init_with_output(KEY, x)
        state, ys = module.apply(params, 2, 24, method="init_state"), []
        for piece in jnp.split(x, (15, 16, 20), 1):
            state, part = module.apply(params, state, piece, method="extend")
            ys.append(part)
        return y, jnp.concatenate(ys, 1)

    chex.assert_trees_all_close(*both(x), rtol=1e-5, atol=1e-5)


def test_refuses_what_it_cannot_do():
    q, k, v = example(6)
    with pytest.raises(NotImplementedError, match="hip_attention can't honour Window"):
        lib.hip_attention(q, k, v, mask=masks.Window(2))
    for options in (dict(block_q=0), dict(block_k=0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            lib.hip_attention(q, k, v, **options)
    for options in (dict(budget=37), dict(budget=36, block_q=32)):
        with pytest.raises(ValueError, match="budget=3. must be a multiple of"):
            lib.hip_attention(q, k, v, **options)
