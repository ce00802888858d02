import chex
import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import ragged_block_attention as ragged

KEY = jax.random.key(0)
T, N, K, L, C = 19, 4, 2, 5, 3


def example(T=T):
    q = jax.random.normal(KEY, (2, T, N, 8))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, L, C, K, 8))
    exists = jnp.ones((L, C), bool).at[1, 1:].set(False).at[4, 0].set(False)
    return q, k, v[..., :5], exists


def draw(T=T, share=0.4):
    return jax.random.bernoulli(jax.random.key(2), share, (2, N, T, L)).at[:, :, 3].set(False)


def of_masks(q, k, v, chosen, exists):
    """The same by a mask for each pair of a query and a key."""
    seen = jnp.repeat(chosen, C, -1) & exists.reshape(1, 1, 1, L * C)
    flat = [x.reshape(2, L * C, K, -1) for x in (k, v)]
    return ops.dot_product_attention(q, *flat, mask=masks.Dense(seen), implementation="dense")


def with_gradients(fn, q, k, v, *rest):
    out, pull = jax.vjp(lambda q, k, v: fn(q, k, v, *rest), q, k, v)
    return out, pull(jnp.cos(out))


def test_equals_a_mask_and_a_query_without_blocks_gives_zeros():
    (q, k, v, exists), chosen = example(), draw()

    @jax.jit
    def both():
        run = ragged.ragged_block_attention
        return [with_gradients(fn, q, k, v, chosen, exists) for fn in (run, of_masks)]

    (actual, grads), expected = both()
    chex.assert_trees_all_close((actual, grads), expected, rtol=1e-5, atol=1e-5)
    assert not actual[:, 3].any() and not grads[0][:, 3].any() and actual[:, 4].any()


def test_one_query_and_nothing_at_all():
    q, k, v, exists = example(1)
    chosen = jnp.zeros((2, N, 1, L), bool).at[1, :, 0, 2].set(True)
    o = jax.jit(ragged.ragged_block_attention)(q, k, v, chosen, exists)
    chex.assert_trees_all_close(o, of_masks(q, k, v, chosen, exists), rtol=1e-5, atol=1e-6)
    assert not o[0].any() and o[1].any()


def test_what_nobody_chose_is_not_read():
    (q, k, v, exists), chosen = example(), draw().at[..., 2].set(False)
    k, v = (x.at[:, 2].set(jnp.nan) for x in (k, v))
    run = jax.jit(lambda *x: with_gradients(ragged.ragged_block_attention, *x, chosen, exists))
    for leaf in jax.tree.leaves(run(q, k, v)):
        assert jnp.isfinite(leaf).all()


def test_tiles_hold_every_chosen_pair_once_and_no_more_tiles_than_needed():
    chosen = np.asarray(draw(37, 0.3)).reshape(-1, 37, L)
    tiles = ragged.lay(jnp.asarray(chosen), 4)
    found = np.zeros_like(chosen, int)
    for j in range(int(tiles.total)):
        u, i, t = tiles.place(j)
        t = np.asarray(t)
        assert (t < 37).any()
        np.add.at(found, (int(u), t[t < 37], int(i)), 1)
    np.testing.assert_array_equal(found, chosen)
    assert int(tiles.total) == np.ceil(chosen.sum(1) / 4).sum()
