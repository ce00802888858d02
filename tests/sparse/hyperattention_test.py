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
from tests.sparse import helpers


def example(T, H=8):
    planes, samples = helpers.normal(H, 3, seed=1), np.random.default_rng(2).uniform(size=7)
    return *helpers.example(T, H=H), planes, samples.astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [
        dict(block=23),
        dict(block=2, mask=masks.Causal(), min_length=23),
        dict(block=12, mask=masks.Causal(), min_length=6),
    ],
)
def test_one_block_or_one_piece_is_attention(options):
    args = example(23)
    full = helpers.program(ops.dot_product_attention, mask=options.get("mask"))(*args[:3])
    actual = helpers.program(lib.hyperattention, **options)(*args)
    chex.assert_trees_all_close(actual, full, rtol=1e-5, atol=1e-6)


def test_neighbours_in_rank_are_apart_by_one_plane():
    sides = np.array(np.meshgrid(*[[-1.0, 1.0]] * 4)).reshape(4, 16).T
    one = sides.astype(np.float32)[None, :, None], np.eye(4, dtype=np.float32)
    rank = helpers.program(lib.lsh_rank)(*one)[0, :, 0]
    assert sorted(rank.tolist()) == list(range(16))
    assert (np.abs(np.diff(sides[np.argsort(rank)], axis=0)).sum(1) == 2).all()


def test_a_sample_is_right_on_average():
    """Of the sum of all weights, by blocks of one key: a mean over draws of one sample each."""
    q, k, _, planes, _ = example(12)
    x = np.einsum("BTNH,BSNH->BTNS", q, np.repeat(k, 2, 2)) / np.float32(8**0.5)

    def total(q, k, planes, sample):
        _, lse = lib._estimate(
            q, k, jnp.ones((2, 12, 2, 1)), planes=planes, samples=sample[None], block=1
        )
        return jnp.exp(lse)

    draws = np.float32((np.arange(12) + 0.5) / 12)  # each key once
    means = helpers.program(lambda *x: jax.vmap(total, (None,) * 3 + (0,))(*x).mean(0))
    chex.assert_trees_all_close(means(q, k, planes, draws), np.exp(x).sum(-1), rtol=1e-5)


def test_finds_large_weights_and_the_more_samples_the_better():
    """A query's own key among 256 is not to be missed; a sample of as many keys does miss it."""
    T, H = 256, 16
    k, v = helpers.normal(2, 1, T, 1, H)
    q, w, draw = 3 * k, helpers.weights(3 * k, k, is_causal=False)[0, 0], np.random.default_rng(1)
    full = w @ v[0, :, 0]
    error = lambda o: np.sqrt(np.mean((o - full) ** 2, (-2, -1)) / np.mean(full**2)).mean()

    def hyper(M):
        planes, samples = helpers.normal(8, H, 8, seed=M), draw.uniform(size=(8, M))
        one = lambda q, k, v, given: lib.hyperattention(q, k, v, *given, block=16)
        run = lambda *args: jax.lax.map(lambda given: one(*args[:3], given), args[3:])
        return helpers.program(run)(q, k, v, planes, samples.astype(np.float32))[:, 0, :, 0]

    rest = np.where(draw.permuted(np.tile(np.arange(T) < 24, (8, 1, 1)), axis=-1), w, 0)
    plain = rest / rest.sum(-1, keepdims=True) @ v[0, :, 0]  # a sample of 24 keys
    few, many = error(hyper(8)), error(hyper(128))
    assert many < 0.7 * few and few < 0.5 * error(plain)


def test_a_causal_mask_hides_later_keys():
    options = dict(block=4, min_length=12, mask=masks.Causal())
    w = helpers.program(functools.partial(edit.matrix, lib.hyperattention), **options)(*example(45))
    assert not np.triu(w, 1).any()
    chex.assert_trees_all_close(w.sum(-1), np.ones_like(w[..., 0]), rtol=1e-5)


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
    args = [jnp.asarray(x) for x in example(6)]
    with pytest.raises(NotImplementedError, match="hyperattention can't honour Valid"):
        lib.hyperattention(*args, mask=masks.Valid(jnp.ones((2, 6), bool)))
    for options in (dict(block=0), dict(min_length=0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            lib.hyperattention(*args, **options)
    with pytest.raises(ValueError, match="T=3 must be S=6"):
        lib.hyperattention(args[0][:, :3], *args[1:], mask=masks.Causal())
