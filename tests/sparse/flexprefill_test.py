"""Only what is particular to FlexPrefill; the rest is tests/conformance_test.py."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks
from attnjax.sparse import flexprefill as lib
from tests.sparse import helpers

C, L = 8, 8  # tokens of a block, blocks
T = C * L
PAST = np.tri(L, dtype=bool)


def select(q, k, **options):
    return helpers.program(lib.select, block=C, **options)(q, k)


def recall(q, k, selected):
    """The share of full causal attention that lies in the selected blocks, by head."""
    w = helpers.weights(q, k)
    return np.where(helpers.tokens(selected, C), w, 0).sum(-1).mean(-1)


def stripe_head():
    """Every query looks at token 26, which alone is loud in its block, and at its own block."""
    own = helpers.one_hot(np.arange(T) // C, 16)
    q, k = 9 * own, 2 * own
    q[:, 15], k[26, 15] = 9.0, 5.0
    return q[None, :, None], k[None, :, None]


def aware_head():
    """Each block of queries looks at a block of its own: that of half its number."""
    number = np.arange(T) // C
    q, k = 16 * helpers.one_hot(number // 2, 16), helpers.one_hot(number, 16)
    return q[None, :, None], k[None, :, None]


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_the_whole_mass_is_full_attention(tau):
    q, k, v = helpers.example(61)
    q[:, -C:] = 1e3 * np.repeat(k[:, :1], 2, 2)  # they look at nothing but token 0
    actual = helpers.program(lib.flexprefill, block=C, gamma=1.0, tau=tau)(q, k, v)
    chex.assert_trees_all_close(actual, helpers.causal(q, k, v), rtol=1e-5, atol=1e-6)


@helpers.program
def surprise(q, k):
    return lib.surprise(q, k, lib.observe(q, k, C)[0], C)[0, 0]


def test_heads_are_told_apart():
    assert surprise(*stripe_head()) > 0.4  # the mean of a block hides its loud token
    assert surprise(*aware_head()) < 0.1


def test_surprise_is_the_root_of_a_divergence():
    (q, k), run = aware_head(), helpers.program(lib.surprise, block=C)
    at = lambda j: run(5 * q, k, helpers.one_hot(j, L)[None, None])[0, 0]
    chex.assert_trees_all_close(at(3), np.float32(0.0), atol=1e-3)  # where the last block looks
    chex.assert_trees_all_close(at(0), np.float32(np.sqrt(np.log(2.0))), rtol=1e-4)


def test_a_stripe_head_gets_its_column_and_its_diagonals():
    q, k = stripe_head()
    selected = select(q, k, gamma=0.9)[0, 0]
    i, j = np.arange(L)[:, None], np.arange(L)[None]
    column = (j == 0) | (j == 3)
    diagonal = (i == j) | (i - j == 3) | (i - j == 4)  # token 26 is 30 to 37 before the last ones
    assert (selected == (j <= i) & (column | diagonal)).all()


def test_a_query_aware_head_gets_blocks_that_no_stripe_holds():
    q, k = aware_head()
    selected = select(q, k, gamma=0.9)
    i = np.arange(L)
    assert selected[0, 0, i, i // 2].all() and selected.sum() < 0.8 * L * (L + 1) / 2
    assert recall(q, k, selected) > 0.9
    blind = select(q, k, gamma=0.9, tau=0.0)  # columns and diagonals of the last queries
    assert recall(q, k, blind) < recall(q, k, selected) - 0.1


def test_more_mass_is_more_blocks_and_less_error():
    q, k, v = helpers.example(T)
    q = 3 * q

    def choices(q, k):
        of = lambda gamma, tau: lib.select(q, k, block=C, gamma=gamma, tau=tau)
        return [[of(gamma, tau) for gamma in (0.3, 0.7)] for tau in (0.0, 1.0)]

    for few, some in helpers.program(choices)(q, k):
        assert few.sum() < some.sum() < 2 * 4 * PAST.sum()
        assert recall(q, k, few).mean() < recall(q, k, some).mean() < 1
        errors = [helpers.error(q, k, v, helpers.tokens(x, C)) for x in (some, few)]
        assert 0 < errors[0] < errors[1]


def test_finds_more_than_a_random_choice_of_the_same_size():
    for q, k in (stripe_head(), aware_head()):
        selected = select(q, k, gamma=0.9)
        noise = np.random.default_rng(0).uniform(size=(20, L, L))
        order = np.where(PAST, noise, 2.0).reshape(20, -1)
        rank = np.argsort(np.argsort(order)).reshape(20, 1, L, L)
        at_random = recall(q, k, rank < selected.sum()).mean()
        assert recall(q, k, selected) > at_random + 0.2


def test_every_query_keeps_a_key_and_sees_no_later_one():
    def both(q, k, v):
        options = dict(block=C, gamma=0.0)
        return lib.select(q, k, **options), edit.matrix(lib.flexprefill, q, k, v, **options)

    selected, w = helpers.program(both)(*helpers.example(43))
    assert selected[..., 0].all() and np.diagonal(selected, axis1=2, axis2=3).all()
    assert w[:, :, 20, :21].any() and not np.triu(w, 1).any()


def test_going_on_is_full_attention():
    options = dict(num_heads=2, head_dim=8, block=4, gamma=0.0, rotary_base=100.0)
    helpers.assert_goes_on_in_full(lib.FlexPrefill(**options))


def test_refuses_what_it_cannot_do():
    q, k, v = (jnp.asarray(x) for x in helpers.example(6))
    with pytest.raises(NotImplementedError, match="flexprefill can't honour Window"):
        lib.flexprefill(q, k, v, mask=masks.Window(2))
    for options in (dict(gamma=1.1), dict(tau=-1.0), dict(block=0), dict(least=0)):
        with pytest.raises(ValueError, match="must be in"):
            lib.flexprefill(q, k, v, **options)
    with pytest.raises(ValueError, match="must be of the tokens of"):
        lib.flexprefill(q[:, :3], k, v)
