"""Only what is particular to SpargeAttn; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.softmax import multi_head_attention as mha
from attnjax.sparse import spargeattn as lib

KEY = jax.random.key(0)
C, L = 8, 8  # tokens of a block, blocks
T = C * L
SIZES = dict(block_q=C, block_k=C)


def example(T=T):
    return lib.SPEC.example(KEY, T).values()


def clustered(scale=24.0):
    """Tokens of a block are alike; block i looks at the blocks i and 3 i modulo 8."""
    number = jnp.arange(T) // C
    own, other = (jax.nn.one_hot(x, L) for x in (number, 3 * number % L))
    noise = 0.1 * jax.random.normal(KEY, (2, T, L))
    q, k = scale * (own + other) + noise[0], own + noise[1]
    return q[None, :, None], k[None, :, None], jax.random.normal(KEY, (1, T, 1, 8))


def select(q, k, **options):
    return jax.jit(functools.partial(lib.select, **(SIZES | dict(causal=False) | options)))(q, k)


def run(*args, **options):
    return jax.jit(functools.partial(lib.spargeattn, **(SIZES | options)))(*args)


@pytest.mark.parametrize("mask", [None, masks.Causal()])
def test_the_whole_mass_and_no_drop_is_attention(mask):
    q, k, v = example(61)
    full = ops.dot_product_attention(q, k, v, mask=mask)
    for drop in (None, -1e9):
        o = run(q, k, v, mask=mask, tau=1.0, drop=drop)
        chex.assert_trees_all_close(o, full, rtol=1e-5, atol=1e-6)


def test_clusters_need_few_blocks():
    q, k, v = clustered()
    selected = select(q, k, tau=0.9)
    i = jnp.arange(L)
    assert selected[0, 0, i, i].all() and selected[0, 0, i, 3 * i % L].all()
    assert selected.mean() < 0.3
    full = ops.dot_product_attention(q, k, v)
    o = run(q, k, v, tau=0.9, drop=-8.0)
    assert jnp.abs(o - full).sum() < 0.05 * jnp.abs(full).sum()
    for other in jax.random.split(KEY, 10):  # a random choice of as many
        order = jax.random.permutation(other, selected.reshape(-1)).reshape(selected.shape)
        o = ops.dot_product_attention(q, k, v, mask=masks.Blocks(order, C, C))
        assert jnp.abs(o - full).sum() > 0.5 * jnp.abs(full).sum()


def test_more_mass_is_more_blocks_and_less_error():
    q, k, v = clustered(6.0)
    full = ops.dot_product_attention(q, k, v)

    @functools.partial(jax.jit, static_argnums=0)
    def measure(tau):
        selected = lib.select(q, k, causal=False, tau=tau, **SIZES)
        o = ops.dot_product_attention(q, k, v, mask=masks.Blocks(selected, C, C))
        return selected.sum(), -jnp.abs(o - full).mean()

    few, some, every = (measure(tau) for tau in (0.2, 0.8, 1.0))
    assert all(a < b < c for a, b, c in zip(few, some, every, strict=True))
    assert every[0] == L * L and every[1] > -1e-6


def test_a_mean_that_says_nothing_is_not_trusted():
    """Block 5 holds keys that cancel, among them the one that all queries look for."""
    q, k, _ = clustered()
    loud = jnp.arange(C) - C / 2 + 0.5
    k = k.at[0, 5 * C : 6 * C, 0].set(2 * jnp.repeat(loud[:, None], L, 1))
    q = q.at[:, : 7 * C].set(20.0)
    assert not select(q, k, tau=0.3, theta=-1.0)[0, 0, :5, 5].any()
    assert select(q, k, tau=0.3, theta=0.5)[0, 0, :, 5].all()
    mixed = q.at[:, 2 * C : 2 * C + C // 2].multiply(-1.0)  # queries that cancel look everywhere
    assert select(mixed, k, tau=0.3, theta=0.5)[0, 0, 2].all()


def test_similarity_is_the_mean_cosine_of_all_pairs():
    x = jax.random.normal(KEY, (2, 10, 3, 4))
    y = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    cosine = jnp.einsum("BTNH,BSNH->BTSN", y, y)
    expected = jnp.stack([cosine[:, :8, :8].mean((1, 2)), cosine[:, 8:, 8:].mean((1, 2))], 1)
    chex.assert_trees_all_close(lib.similarity(x, 8), expected, atol=1e-5)


def test_a_vector_common_to_all_keys_changes_nothing():
    q, k, v = clustered()
    sign = jnp.where((jnp.arange(T) // C == 5) & (jnp.arange(T) % 2 == 0), -1.0, 1.0)
    k = k * sign[None, :, None, None]  # the keys of block 5 cancel, so that all read it
    # eighths, in 16 features for a scale of 1/4: then scores of hundreds are exact, too
    exact = lambda x: jnp.pad(jnp.round(8 * x) / 8, ((0, 0),) * 3 + ((0, 16 - L),))
    q, k, shift = exact(q), exact(k), exact(9 * jax.random.normal(KEY, (1, 1, 1, L)))
    shifted = k + shift
    assert select(q, k, tau=0.5)[0, 0, :, 5].all()
    chex.assert_trees_all_equal(select(q, shifted, tau=0.5), select(q, k, tau=0.5))
    chex.assert_trees_all_close(run(q, shifted, v), run(q, k, v), rtol=1e-5, atol=1e-6)


def test_the_second_filter_changes_little_and_skips_values():
    q, k, v = clustered()
    every = functools.partial(run, tau=1.0)
    full, few = every(q, k, v), every(q, k, v, drop=-3.0)
    chex.assert_trees_all_close(few, full, atol=C * L * jnp.exp(-3.0))
    k = k.at[:, :C].set(9.0)  # block 0 is seen first, and block 6 is far below for every query
    k = k.at[:, 6 * C : 7 * C].set(-9.0)
    q = jnp.abs(q)
    spoiled = v.at[:, 6 * C : 7 * C].set(jnp.nan)
    assert jnp.isfinite(every(q, k, spoiled, drop=-3.0)).all()
    assert jnp.isnan(every(q, k, spoiled, drop=-1e9)).any()


def test_a_block_that_no_query_chose_is_not_read():
    tokens = 384  # more than the dense implementation takes
    own = jax.nn.one_hot(jnp.arange(tokens) // 64, 8)[None, :, None]
    q, k = 40 * own.at[:, 128:192].set(own[:, :64]), own
    v = jnp.where(jnp.arange(tokens) // 64 == 2, jnp.nan, 1.0)[None, :, None, None]
    o = run(q, k, v, block_q=64, block_k=64, tau=0.9)
    chex.assert_trees_all_close(o, jnp.ones_like(o), rtol=1e-5)


def test_no_query_is_left_without_a_key_and_none_sees_a_later_one():
    q, k, v = example(45)
    causal = dict(mask=masks.Causal(), tau=0.0, theta=-1.0, block_q=16, block_k=4)
    weights = run(q, k, jnp.ones_like(v), **causal)
    chex.assert_trees_all_close(weights, jnp.ones_like(weights), rtol=1e-5)
    grad = jax.grad(lambda v: (run(q, k, v, **causal)[:, 20] ** 2).sum())(v)
    assert grad[:, :21].any() and not grad[:, 21:].any()


def test_is_a_function_of_multi_head_attention():
    few = functools.partial(lib.spargeattn, tau=0.0, theta=-1.0, block_q=4, block_k=4)
    x = jax.random.normal(KEY, (2, 12, 16))

    @jax.jit
    def outputs(x):
        module = mha.MultiHeadAttention(num_heads=2, head_dim=8)
        params, causal = module.init(KEY, x), masks.Causal()
        state = module.apply(params, 2, 12, method="init_state")
        sparse = module.clone(fn=few)
        _, steps = sparse.apply(params, state, x, method="extend")
        return module.apply(params, x, mask=causal), sparse.apply(params, x, mask=causal), steps

    full, sparse, steps = outputs(x)
    chex.assert_trees_all_close(steps, full, rtol=1e-5, atol=1e-6)
    assert jnp.abs(sparse - full).max() > 1e-2
    chex.assert_trees_all_close(sparse[:, :4], full[:, :4], rtol=1e-5, atol=1e-6)


def test_refuses_what_it_cannot_do():
    q, k, v = example(6)
    with pytest.raises(NotImplementedError, match="spargeattn can't honour Window"):
        lib.spargeattn(q, k, v, mask=masks.Window(2))
    for options in (dict(tau=1.1), dict(theta=-2.0), dict(block_q=0), dict(block_k=0)):
        with pytest.raises(ValueError, match="must be in"):
            lib.spargeattn(q, k, v, **options)
    with pytest.raises(ValueError, match="drop=1.0 must be at most 0"):
        lib.spargeattn(q, k, v, drop=1.0)
