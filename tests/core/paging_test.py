"""Pages are written where the table says, given once, and given again after their release."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import decode, paging

KEY = jax.random.key(0)
B, K, C = 3, 2, 4
append, reserve = jax.jit(paging.PagedCache.append), jax.jit(paging.PagedCache.reserve)


def empty(pages=None, V=5, length=10):
    return paging.PagedCache.empty(B, length, K, 6, V, jnp.float32, page_size=C, pages=pages)


def tokens(T, seed=0):
    draw = np.random.default_rng(seed).normal
    return [draw(size=(B, T, K, n)).astype(np.float32) for n in (6, 5)]


def read(cache, b):
    """The keys and values of a sequence: (length K F)."""
    cache = jax.device_get(cache)
    of = lambda pool: np.concatenate([pool[p].swapaxes(0, 1) for p in cache.table[b]])
    return [of(x)[: cache.lengths[b]] for x in cache[:2]]


def test_append_crosses_pages():
    cache, (k, v) = empty(), tokens(10)
    for piece in (slice(0, 3), slice(3, 4), slice(4, 10)):
        cache = append(cache, k[:, piece], v[:, piece])
    np.testing.assert_array_equal(cache.lengths, [10] * B)
    for b in range(B):
        chex.assert_trees_all_equal(read(cache, b), [k[b], v[b]])


def test_each_sequence_has_its_own_count():
    cache, (k, v), (more, values) = empty(), tokens(7), tokens(5, seed=5)
    cache = append(cache, k, v, np.array([7, 0, 4]))
    cache = append(cache, more, values, np.array([0, 5, 1]))
    np.testing.assert_array_equal(cache.lengths, [7, 5, 5])
    chex.assert_trees_all_equal(read(cache, 0), [k[0], v[0]])
    chex.assert_trees_all_equal(read(cache, 1), [more[1], values[1]])
    chex.assert_trees_all_equal(read(cache, 2)[0], np.concatenate([k[2, :4], more[2, :1]]))


def test_a_token_without_room_is_not_kept():
    cache, (k, v) = empty(), tokens(13)
    cache = append(cache, k, v)  # three pages have room for 12
    np.testing.assert_array_equal(cache.lengths, [12] * B)
    chex.assert_trees_all_equal(read(cache, 1), [k[1, :12], v[1, :12]])
    more = append(cache, k[:, :1], v[:, :1])
    chex.assert_trees_all_equal(more, cache)


def test_pages_are_given_once_and_again_after_release():
    cache = reserve(empty(pages=5), np.array([9, 1, 4]))
    np.testing.assert_array_equal(cache.room, [12, 4, 4])
    table = np.asarray(cache.table)
    named = table[table >= 0]
    assert len(set(named.tolist())) == 5
    k, v = tokens(3)
    cache = reserve(append(cache, k, v), np.array([9, 1, 8]))
    np.testing.assert_array_equal(cache.room, [12, 4, 4])  # the pool has none left
    cache = cache.release(jnp.array([True, False, False]))
    np.testing.assert_array_equal(cache.lengths, [0, 3, 3])
    cache = reserve(cache, np.array([0, 9, 8]))
    np.testing.assert_array_equal(cache.room, [0, 12, 8])
    for b in (1, 2):  # what they held has stayed
        chex.assert_trees_all_equal(read(cache, b), [k[b], v[b]])
    table = np.asarray(cache.table)
    assert len(set(table[table >= 0].tolist())) == 5


def test_no_more_than_the_table_has_places_for():
    cache = reserve(empty(pages=20), np.array([100, 0, 0]))
    np.testing.assert_array_equal(cache.room, [12, 0, 0])


def test_a_shared_page_is_free_only_when_nobody_has_it():
    cache = reserve(empty(pages=3), jnp.array([4, 0, 0]))
    cache = cache._replace(table=cache.table.at[1, 0].set(cache.table[0, 0]))
    cache = reserve(cache.release(jnp.array([True, False, False])), jnp.array([12, 0, 0]))
    np.testing.assert_array_equal(cache.room, [8, 4, 0])
    assert cache.table[1, 0] not in cache.table[0]


def test_latents_have_no_values():
    k = jnp.asarray(tokens(5)[0])
    cache = append(empty(V=None), k, None)
    assert cache.v is None
    for b in range(B):
        np.testing.assert_array_equal(cache.k[cache.table[b, 1], :, 0], k[b, 4])
    for wrong in (lambda: cache.append(k, k), lambda: empty().append(k, None)):
        with pytest.raises(ValueError, match="v must be given where the cache has values, and"):
            wrong()


def test_rewind_cuts_what_is_too_long():
    k, v = tokens(7)
    cache = append(empty(), k, v)
    state = {"a": cache, "b": (jax.tree.map(lambda x: jnp.stack([x, x]), cache),)}  # of two layers
    cut = paging.rewind(state, jnp.array([3, 7, 9]))
    np.testing.assert_array_equal(cut["a"].lengths, [3, 7, 7])
    np.testing.assert_array_equal(cut["b"][0].lengths, [[3, 7, 7]] * 2)
    again = append(cut["a"], k[:, 3:4], v[:, 3:4])
    chex.assert_trees_all_equal(read(again, 0), [k[0, :4], v[0, :4]])


def test_only_paged_caches_can_be_rewound():
    state = decode.KVCache.empty(B, 4, K, 6, 5, jnp.float32)
    with pytest.raises(ValueError, match="only paged caches can be rewound, and the state has"):
        paging.rewind(state, jnp.zeros(B, int))


@pytest.mark.parametrize("wrong", [dict(length=0), dict(pages=0)], ids=str)
def test_sizes_below_one(wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        empty(**wrong)
