import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import block_selection as blocks
from attnjax.ops import dot_product_attention as ops

KEY = jax.random.key(0)


def test_means_are_of_the_tokens_that_are_seen():
    x = jax.random.normal(KEY, (2, 7, 1, 3))
    seen = jnp.ones((2, 7), bool).at[0, 1].set(False).at[1, 4:].set(False)
    actual = blocks.means(x, 4, seen)
    expected = [[x[0, [0, 2, 3]].mean(0), x[0, 4:].mean(0)], [x[1, :4].mean(0), 0 * x[1, 0]]]
    chex.assert_trees_all_close(actual, jnp.stack([jnp.stack(row) for row in expected]), atol=1e-6)


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
    w = jax.random.uniform(KEY, (50, 12)) * (jnp.arange(12) % 4 > 0)[None]
    chosen = blocks.smallest_set(w, mass)
    total, reached = w.sum(-1), jnp.where(chosen, w, 0).sum(-1)
    least = jnp.where(chosen, w, jnp.inf).min(-1)
    assert (chosen.sum(-1) >= 1).all() and (reached >= mass * total * (1 - 1e-6)).all()
    more = chosen.sum(-1) > 1
    assert (jnp.where(more, reached - least, -1.0) < mass * total).all()
    assert not chosen[:, ::4].any(), "an entry without weight"
    assert (jnp.where(chosen, -jnp.inf, w).max(-1) <= least).all()


@pytest.mark.parametrize("implementation", ["dense", "blocked"])
def test_a_selection_is_a_mask(implementation):
    q, k, v = jax.random.normal(KEY, (3, 2, 50, 2, 8))
    selected = jax.random.bernoulli(KEY, 0.5, (2, 2, 4, 7))
    mask = masks.Blocks(selected, 16, 8) & masks.Causal()
    seen = jnp.repeat(jnp.repeat(selected, 16, 2), 8, 3)[:, :, :50, :50]
    dense = masks.Dense(seen & masks.dense(masks.Causal(), 50, 50))
    run = jax.jit(
        lambda mask, how: ops.dot_product_attention(q, k, v, mask=mask, implementation=how),
        static_argnums=1,
    )
    chex.assert_trees_all_close(run(mask, implementation), run(dense, "dense"), atol=1e-5)
