"""Only what is particular to SALE; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks
from attnjax.ops import block_selection as blocks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import sale as lib

KEY = jax.random.key(0)
T, C, L = 64, 4, 16  # tokens, those of a block, blocks
SIZES = dict(block_q=C, block_k=C, local=C)


def example(T=T):
    return lib.SPEC.example(KEY, T).values()


def needles(at=(13, 22, 33, 42)):
    """Single keys that every query looks for, each among others that point away from it."""
    q = jax.random.normal(KEY, (1, T, 1, 16)).at[..., 0].add(12.0)
    k = jax.random.normal(jax.random.key(1), (1, T, 1, 16))
    beside = jnp.isin(jnp.arange(T) // C, jnp.array(at) // C)
    along = jnp.where(jnp.isin(jnp.arange(T), jnp.array(at)), 3.0, jnp.where(beside, -1.5, 0.0))
    return q, k.at[..., 0].set(along[None, :, None])


def run(*args, **options):
    return jax.jit(functools.partial(lib.sale, **(SIZES | options)))(*args)


def select(q, k, **options):
    return jax.jit(functools.partial(lib.select, **(SIZES | options)))(q, k)


def weights(q, k):
    k = jnp.repeat(k, q.shape[2] // k.shape[2], 2)
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(masks.dense(masks.Causal(), T, T), x, -jnp.inf))


def recall(q, k, selected, first=0):
    """The share of the attention from query `first` on that lies in the selected blocks."""
    at = jnp.arange(T) // C
    found = jnp.where(selected[:, :, at][:, :, :, at], weights(q, k), 0).sum(-1)
    return float(found[:, :, first:].mean())


def test_no_threshold_is_full_attention():
    args = example(61)
    full = ops.dot_product_attention(*args, mask=masks.Causal())
    chex.assert_trees_all_close(run(*args, threshold=0.0), full, rtol=1e-5, atol=1e-6)


def test_above_every_score_are_the_first_and_local_blocks():
    q, k, _ = example()
    selected = select(q, k, threshold=1e9)
    i, j = jnp.arange(L)[:, None], jnp.arange(L)[None]
    assert (selected == ((j == 0) | (i - j <= 1) & (j <= i))[None, None]).all()


def test_finds_needles_that_block_means_hide():
    q, k = needles()
    selected = select(q, k, threshold=5.0)
    assert selected[0, 0, 12:, jnp.array([13, 22, 33, 42]) // C].all()  # far from all of them
    pooled = jnp.einsum("BQNH,BLNH->BNQL", blocks.means(q, C), blocks.means(k, C))
    always = select(q, k, threshold=1e9)
    past = jnp.tril(jnp.ones((L, L), bool))[None, None]
    order = lambda x: jnp.argsort(jnp.argsort(-jnp.where(past & ~always, x, -jnp.inf)))
    count = (selected & ~always).sum(-1, keepdims=True)
    by_means = always | (order(pooled) < count) & past
    by_chance = always | (order(jax.random.uniform(KEY, pooled.shape)) < count) & past
    ours, others = recall(q, k, selected, 48), (recall(q, k, x, 48) for x in (by_means, by_chance))
    assert ours > 0.95 and all(other < ours - 0.4 for other in others)


def test_a_higher_threshold_is_fewer_blocks_and_more_error():
    q, k, v = example()
    q = 2 * q
    full = ops.dot_product_attention(q, k, v, mask=masks.Causal())

    @functools.partial(jax.jit, static_argnums=0)
    def measure(threshold):
        selected = lib.select(q, k, threshold=threshold, **SIZES)
        mask = masks.Blocks(selected, C, C) & masks.Causal()
        error = ops.dot_product_attention(q, k, v, mask=mask) - full
        return selected, -jnp.abs(error).mean()

    results = [measure(threshold) for threshold in (0.1, 0.4, 1.6)]
    many, some, few = ((x.sum(), recall(q, k, x), error) for x, error in results)
    assert all(a > b > c for a, b, c in zip(many, some, few, strict=True))


def test_every_head_has_a_threshold_of_its_own():
    q, k, _ = example()
    mixed = select(q, k, threshold=(0.0, 0.3, 0.3, 1e9))
    for head, threshold in enumerate((0.0, 0.3, 0.3, 1e9)):
        alone = select(q, k, threshold=threshold)
        chex.assert_trees_all_equal(mixed[:, head], alone[:, head])


def test_four_bits_hold_a_vector_roughly():
    x = jax.random.normal(KEY, (5, 3, 64))
    number, scale = lib.bits(x)
    assert number.dtype == jnp.int8 and (jnp.abs(number).max(-1) == 7).all()
    assert (jnp.abs(number * scale - x) <= scale * 0.501).all()
    number, scale = lib.bits(jnp.zeros((2, 8)))
    assert not number.any() and not scale.any()


def test_what_all_tokens_share_costs_no_bits():
    q, k, v = example()
    same = jax.random.normal(jax.random.key(2), (2, 1, 1, 8))
    shifted = select(q + 20 * same, k + 30 * same, threshold=0.3)
    exact = weights(q + 20 * same, k)  # a common part of keys changes no weight
    always = select(q, k, threshold=1e9)
    at = jnp.arange(T) // C
    mass = jnp.where(always[:, :, at][:, :, :, at], exact, 0).sum(-1, keepdims=True)
    loud = (exact > 0.3 * mass).reshape(2, 4, L, C, L, C).any((3, 5))
    assert (shifted == (loud | always)).mean() > 0.97
    chex.assert_trees_all_close(
        run(q, k + 30 * same, v, threshold=0.0), run(q, k, v, threshold=0.0), atol=1e-4
    )


def test_going_on_is_full_attention():
    module = lib.Sale(num_heads=2, head_dim=8, threshold=1e9, block_q=2, block_k=2, local=0)
    dense = module.clone(fn=lambda *x, mask, **_: ops.dot_product_attention(*x, mask=mask))
    x = jax.random.normal(KEY, (2, 20, 16))

    @jax.jit
    def both(x):
        params = module.init(KEY, x)
        state = module.apply(params, 2, 24, method="init_state")
        state, a = module.apply(params, state, x[:, :15], method="extend")
        state, b = module.apply(params, state, x[:, 15:], method="extend")
        return jnp.concatenate([a, b], 1), dense.apply(params, x, mask=masks.Causal())

    chex.assert_trees_all_close(*both(x), rtol=1e-5, atol=1e-5)


def test_refuses_what_it_cannot_do():
    q, k, v = example(6)
    with pytest.raises(NotImplementedError, match="sale can't honour Window"):
        lib.sale(q, k, v, mask=masks.Window(2))
    for options in (dict(threshold=-1.0), dict(block_q=0), dict(block_k=0), dict(local=-1)):
        with pytest.raises(ValueError, match="must be at least 0"):
            lib.sale(q, k, v, **options)
    with pytest.raises(ValueError, match="one for each of 4 heads"):
        lib.sale(q, k, v, threshold=(0.1, 0.1))
    with pytest.raises(ValueError, match="must be of the tokens of"):
        lib.sale(q[:, :3], k, v)
