import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import block_selection as blocks
from attnjax.ops import dot_product_attention as ops


def test_means_are_of_the_tokens_that_are_seen():
    x = np.random.default_rng(0).standard_normal((2, 7, 1, 3), "f4")
    seen = np.ones((2, 7), bool)
    seen[0, 1] = seen[1, 4:] = False
    actual = jax.jit(lambda x, seen: blocks.means(x, 4, seen))(x, seen)
    expected = [[x[0, [0, 2, 3]].mean(0), x[0, 4:].mean(0)], [x[1, :4].mean(0), 0 * x[1, 0]]]
    chex.assert_trees_all_close(actual, np.stack([np.stack(row) for row in expected]), atol=1e-6)


def test_reachable_are_blocks_with_a_visible_pair():
    for T, S, block_q, block_k in ((9, 9, 4, 2), (8, 8, 2, 4), (5, 5, 8, 3), (1, 1, 1, 1)):
        states = masks.tiles(masks.Causal(), T, S, block_q=block_q, block_k=block_k)[0, 0]
        reachable = blocks.reachable(T, S, block_q, block_k)
        np.testing.assert_array_equal(reachable, states != masks.EMPTY)


def test_best_prefers_the_earlier_of_equals_and_never_what_is_hidden():
    score = jnp.array([1.0, 3.0, 3.0, -jnp.inf])
    chosen = [blocks.best(score, n).tolist() for n in range(5)]
    assert [sum(x) for x in chosen] == [0, 1, 2, 3, 3]
    assert chosen[1] == [False, True, False, False]


@pytest.mark.parametrize("mass", [0.0, 0.3, 0.75, 1.0])
def test_smallest_set_reaches_its_mass_and_would_not_with_one_less(mass):
    w = np.random.default_rng(0).random((50, 12), "f4") * (np.arange(12) % 4 > 0)
    chosen = np.asarray(jax.jit(lambda w: blocks.smallest_set(w, mass))(w))
    total, reached = w.sum(-1), np.where(chosen, w, 0).sum(-1)
    least = np.where(chosen, w, np.inf).min(-1)
    assert (chosen.sum(-1) >= 1).all() and (reached >= mass * total * (1 - 1e-6)).all()
    more = chosen.sum(-1) > 1
    assert (np.where(more, reached - least, -1.0) < mass * total).all()
    assert not chosen[:, ::4].any(), "an entry without weight"
    assert (np.where(chosen, -np.inf, w).max(-1) <= least).all()


def test_a_selection_is_a_mask():
    draw = np.random.default_rng(0)
    q, k, v = draw.standard_normal((3, 2, 50, 2, 8), "f4")
    selected = draw.random((2, 2, 4, 7)) < 0.5
    seen = np.repeat(np.repeat(selected, 16, 2), 8, 3)[:, :, :50, :50]

    @jax.jit
    def runs(selected, seen, q, k, v):
        mask = masks.Blocks(selected, 16, 8) & masks.Causal()
        attend = lambda mask, how: ops.dot_product_attention(q, k, v, mask=mask, implementation=how)
        found = [attend(mask, how) for how in ("dense", "blocked")]
        return *found, attend(masks.Dense(seen) & masks.Causal(), "dense")

    *found, expected = runs(selected, seen, q, k, v)
    for o in found:
        chex.assert_trees_all_close(o, expected, atol=1e-5)
