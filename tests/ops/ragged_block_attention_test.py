import chex
import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import ragged_block_attention as ragged

T, N, K, L, C = 19, 4, 2, 5, 3


def example(T=T):
    draw = np.random.default_rng(0).standard_normal
    q, k, v = draw((2, T, N, 8), "f4"), draw((2, L, C, K, 8), "f4"), draw((2, L, C, K, 5), "f4")
    exists = np.ones((L, C), bool)
    exists[1, 1:] = exists[4, 0] = False
    return tuple(map(jnp.asarray, (q, k, v, exists)))


def draw(T=T, share=0.4):
    chosen = np.random.default_rng(2).random((2, N, T, L)) < share
    chosen[:, :, 3] = False
    return chosen


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
    def both(*args):
        run = ragged.ragged_block_attention
        return [with_gradients(fn, *args) for fn in (run, of_masks)]

    (actual, grads), expected = jax.device_get(both(q, k, v, chosen, exists))
    chex.assert_trees_all_close((actual, grads), expected, rtol=1e-5, atol=1e-5)
    assert not actual[:, 3].any() and not grads[0][:, 3].any() and actual[:, 4].any()


def test_one_query_and_nothing_at_all():
    q, k, v, exists = example(1)
    chosen = np.zeros((2, N, 1, L), bool)
    chosen[1, :, 0, 2] = True
    both = jax.jit(lambda *x: [fn(*x) for fn in (ragged.ragged_block_attention, of_masks)])
    o, expected = jax.device_get(both(q, k, v, chosen, exists))
    chex.assert_trees_all_close(o, expected, rtol=1e-5, atol=1e-6)
    assert not o[0].any() and o[1].any()


def test_what_nobody_chose_is_not_read():
    (q, k, v, exists), chosen = example(), draw()
    chosen[..., 2] = False
    third = np.arange(L)[:, None, None, None] == 2
    k, v = (np.where(third, np.nan, x) for x in (k, v))
    run = jax.jit(lambda *x: with_gradients(ragged.ragged_block_attention, *x))
    for leaf in jax.tree.leaves(run(q, k, v, chosen, exists)):
        assert np.isfinite(leaf).all()


def test_tiles_hold_every_chosen_pair_once_and_no_more_tiles_than_needed():
    chosen = draw(37, 0.3).reshape(-1, 37, L)
    tiles = jax.jit(ragged.lay, static_argnums=1)(chosen, 4)
    place = jax.jit(ragged.Tiles.place)
    found = np.zeros_like(chosen, int)
    for j in range(int(tiles.total)):
        u, i, t = place(tiles, j)
        t = np.asarray(t)
        assert (t < 37).any()
        np.add.at(found, (int(u), t[t < 37], int(i)), 1)
    np.testing.assert_array_equal(found, chosen)
    assert int(tiles.total) == np.ceil(chosen.sum(1) / 4).sum()
