"""Only what is particular to SALE; the rest is tests/conformance_test.py."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import block_selection as blocks
from attnjax.sparse import sale as lib
from tests.parallel import helpers as devices
from tests.sparse import helpers

T, C, L = 64, 4, 16  # tokens, those of a block, blocks
SIZES = dict(block_q=C, block_k=C, local=C)
i, j = np.arange(L)[:, None], np.arange(L)[None]
ALWAYS = (j == 0) | (i - j <= 1) & (j <= i)


def needles(at=(13, 22, 33, 42)):
    """Single keys that every query looks for, each among others that point away from it."""
    q, k = helpers.normal(2, 1, T, 1, 16)
    beside = np.isin(np.arange(T) // C, np.array(at) // C)
    along = np.where(np.isin(np.arange(T), at), 3.0, np.where(beside, -1.5, 0.0))
    q[..., 0] += 12.0
    k[..., 0] = along[None, :, None]
    return q, k


def run(*args, **options):
    return helpers.program(lib.sale, **(SIZES | options))(*args)


def select(q, k, **options):
    return helpers.program(lib.select, **(SIZES | options))(q, k)


def recall(q, k, selected, first=0):
    """The share of the attention from query `first` on that lies in the selected blocks."""
    found = np.where(helpers.tokens(selected, C), helpers.weights(q, k), 0).sum(-1)
    return float(found[:, :, first:].mean())


def test_no_threshold_is_full_attention():
    """Nor is it changed by what all keys share, for which there are no bits."""
    q, k, v = helpers.example(61)
    o, full = run(q, k, v, threshold=0.0), helpers.causal(q, k, v)
    chex.assert_trees_all_close(o, full, rtol=1e-5, atol=1e-6)
    shifted = k + 30 * helpers.normal(2, 1, 1, 8, seed=2)
    chex.assert_trees_all_close(run(q, shifted, v, threshold=0.0), full, atol=1e-4)


def test_finds_needles_that_block_means_hide():
    q, k = needles()
    selected, at = select(q, k, threshold=5.0), np.array([13, 22, 33, 42]) // C
    assert selected[0, 0, 12:, at].all()  # far from all of them
    q_means, k_means = (helpers.program(blocks.means, block=C)(x) for x in (q, k))
    pooled = np.einsum("BQNH,BLNH->BNQL", q_means, k_means)
    order = lambda x: np.argsort(np.argsort(-np.where((j <= i) & ~ALWAYS, x, -np.inf)))
    count = (selected & ~ALWAYS).sum(-1, keepdims=True)
    noise = np.random.default_rng(0).uniform(size=pooled.shape)
    by_means, by_chance = (ALWAYS | (order(x) < count) & (j <= i) for x in (pooled, noise))
    ours, others = recall(q, k, selected, 48), (recall(q, k, x, 48) for x in (by_means, by_chance))
    assert ours > 0.95 and all(other < ours - 0.4 for other in others)


def test_a_higher_threshold_is_fewer_blocks_and_more_error():
    """In one program: four heads that are the same but for their thresholds."""
    q, k, v = (x[:, :, :1].repeat(4, 2) for x in helpers.example(T))
    selected = select(2 * q, k, threshold=(0.1, 0.4, 1.6, 1e9))
    errors, found = [], []
    for head in range(3):
        seen, one = selected[:, head : head + 1], (2 * q[:, :, :1], k[:, :, :1], v[:, :, :1])
        errors.append(helpers.error(*one, helpers.tokens(seen, C) & np.tri(T, dtype=bool)))
        found.append(recall(*one[:2], seen))
    count = selected.sum((0, 2, 3)).tolist()
    assert count[0] > count[1] > count[2] and found[0] > found[1] > found[2]
    assert errors[0] < errors[1] < errors[2]


def test_every_head_has_a_threshold_of_its_own():
    """Where each choice is known: all blocks, those of another call, the first and local ones."""
    q, k, _ = helpers.example(T)
    mixed = select(q, k, threshold=(0.0, 0.3, 0.3, 1e9))
    assert (mixed[:, 0] == (j <= i)).all() and (mixed[:, 3] == ALWAYS).all()
    chex.assert_trees_all_equal(mixed[:, 1:3], select(q, k, threshold=0.3)[:, 1:3])


def test_four_bits_hold_a_vector_roughly():
    x = helpers.normal(5, 3, 64)
    x[4] = 0.0
    number, scale = helpers.program(lib.bits)(x)
    assert number.dtype == jnp.int8 and (np.abs(number[:4]).max(-1) == 7).all()
    assert (np.abs(number * scale - x) <= scale * 0.501).all()
    assert not number[4].any() and not scale[4].any()


def test_what_all_tokens_share_costs_no_bits():
    q, k, _ = helpers.example(T)
    same = helpers.normal(2, 1, 1, 8, seed=2)
    shifted = select(q + 20 * same, k + 30 * same, threshold=0.3)
    # a common part of keys changes no weight
    exact = helpers.weights((q + 20 * same).astype(np.float64), k)
    mass = np.where(helpers.tokens(ALWAYS, C), exact, 0).sum(-1, keepdims=True)
    loud = (exact > 0.3 * mass).reshape(2, 4, L, C, L, C).any((3, 5))
    assert (shifted == (loud | ALWAYS)).mean() > 0.97


def test_going_on_is_full_attention():
    options = dict(threshold=1e9, block_q=2, block_k=2, local=0)
    helpers.assert_goes_on_in_full(lib.Sale(num_heads=2, head_dim=8, **options))


def test_an_array_of_thresholds_is_split_with_the_heads():
    options = dict(threshold=jnp.array([0.0, 0.2, 0.4, 9.0]), block_q=2, block_k=1, local=1)
    devices.assert_same("all_to_all", lib.SPEC, helpers.example(13), dict(context=4), **options)


def test_refuses_what_it_cannot_do():
    q, k, v = (jnp.asarray(x) for x in helpers.example(6))
    with pytest.raises(NotImplementedError, match="sale can't honour Window"):
        lib.sale(q, k, v, mask=masks.Window(2))
    for options in (dict(threshold=-1.0), dict(block_q=0), dict(block_k=0), dict(local=-1)):
        with pytest.raises(ValueError, match="must be at least 0"):
            lib.sale(q, k, v, **options)
    with pytest.raises(ValueError, match="one for each of 4 heads"):
        lib.sale(q, k, v, threshold=(0.1, 0.1))
    with pytest.raises(ValueError, match="must be of the tokens of"):
        lib.sale(q[:, :3], k, v)
