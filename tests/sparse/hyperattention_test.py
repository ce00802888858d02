"""Only what is particular to HyperAttention; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import hyperattention as lib
from tests import cost

KEY = jax.random.key(0)


def example(T):
    return list(lib.SPEC.example(KEY, T).values())


@pytest.mark.parametrize(
    "options",
    [
        dict(block=23),
        dict(block=2, mask=masks.Causal(), min_length=23),
        dict(block=12, mask=masks.Causal(), min_length=3),
    ],
)
def test_one_block_or_one_piece_is_attention(options):
    q, k, v, *given = example(23)
    full = ops.dot_product_attention(q, k, v, mask=options.get("mask"))
    actual = lib.hyperattention(q, k, v, *given, **options)
    chex.assert_trees_all_close(actual, full, rtol=1e-5, atol=1e-6)


def test_neighbours_in_rank_are_apart_by_one_plane():
    sides = np.array(np.meshgrid(*[[-1.0, 1.0]] * 4)).reshape(4, 16).T
    rank = lib.lsh_rank(jnp.asarray(sides, jnp.float32)[None, :, None], jnp.eye(4))[0, :, 0]
    assert sorted(rank.tolist()) == list(range(16))
    assert (np.abs(np.diff(sides[np.argsort(rank)], axis=0)).sum(1) == 2).all()


def test_a_sample_is_right_on_average():
    """Of the sum of all weights, by blocks of one key: a mean over draws of one sample each."""
    q, k, _, planes, _ = example(12)
    ones = jnp.ones((2, 12, 2, 1))
    x = jnp.einsum("BTNH,BSNH->BTNS", q, jnp.repeat(k, 2, 2)) / 8**0.5

    def total(sample):
        _, lse = lib._estimate(q, k, ones, planes=planes, samples=sample[None], block=1)
        return jnp.exp(lse)

    draws = (jnp.arange(12) + 0.5) / 12  # each key once
    mean = jax.jit(lambda: jax.vmap(total)(draws).mean(0))()
    chex.assert_trees_all_close(mean, jnp.exp(x).sum(-1), rtol=1e-5)


def test_finds_large_weights_and_the_more_samples_the_better():
    """A query's own key among 256 is not to be missed; a sample of as many keys does miss it."""
    T, H = 256, 16
    k = jax.random.normal(KEY, (1, T, 1, H))
    q, v = 3 * k, jax.random.normal(jax.random.key(1), (1, T, 1, H))
    full = ops.dot_product_attention(q, k, v)

    def error(estimate, M):
        def of(seed):
            keys = jax.random.split(jax.random.key(seed))
            o = estimate(jax.random.normal(keys[0], (H, 8)), jax.random.uniform(keys[1], (M,)))
            return jnp.sqrt(jnp.mean((o - full) ** 2) / jnp.mean(full**2))

        return jax.lax.map(of, jnp.arange(8)).mean()

    hyper = lambda *given: lib.hyperattention(q, k, v, *given, block=16)

    def sample(_, samples):
        at = (samples * T).astype(int)
        return ops.dot_product_attention(q, k[:, at], v[:, at])

    few, many, plain = jax.jit(lambda: (error(hyper, 8), error(hyper, 128), error(sample, 24)))()
    assert many < 0.7 * few and few < 0.5 * plain


def test_a_causal_mask_hides_later_keys():
    q, k, v, *given = example(45)
    options = dict(block=4, min_length=6, mask=masks.Causal())
    w = jax.jit(lambda: edit.matrix(lib.hyperattention, q, k, v, *given, **options))()
    assert not np.triu(w, 1).any()
    chex.assert_trees_all_close(w.sum(-1), jnp.ones((2, 4, 45)), rtol=1e-5)


def test_cost_is_near_to_linear():
    def count(T, mask):
        shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
        args = [shape(1, T, 1, 32)] * 3 + [shape(32, 7), shape(16)]
        options = dict(block=64, min_length=128, mask=mask)
        fn = functools.partial(lib.hyperattention, **options)
        return cost.operations(jax.grad(lambda *x: fn(*x).sum(), (0, 1, 2)), *args)

    for mask, most in ((None, 2.01), (masks.Causal(), 2.4)):
        assert count(4096, mask) < most * count(2048, mask)


def test_refuses_what_it_cannot_do():
    args = example(6)
    with pytest.raises(NotImplementedError, match="hyperattention can't honour Valid"):
        lib.hyperattention(*args, mask=masks.Valid(jnp.ones((2, 6), bool)))
    for options in (dict(block=0), dict(min_length=0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            lib.hyperattention(*args, **options)
    with pytest.raises(ValueError, match="T=3 must be S=6"):
        lib.hyperattention(args[0][:, :3], *args[1:], mask=masks.Causal())
