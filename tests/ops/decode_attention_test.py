"""Over a paged cache, beside `dot_product_attention` over the same tokens in one piece."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks, paging
from attnjax.ops import decode_attention
from attnjax.ops import dot_product_attention as ops

B, S, N, K, H, V = 2, 11, 4, 2, 8, 6


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_equals_attention_in_one_piece(implementation):
    q, k, v, sinks = (
        normal(0, B, 3, N, H),
        normal(1, B, S, K, H),
        normal(2, B, S, K, V),
        normal(3, N),
    )
    options = dict(softcap=4.0, sinks=sinks, return_lse=True)

    @jax.jit
    def run():
        empty = paging.PagedCache.empty(B, S, K, H, V, "float32", page_size=4)
        more = dict(window=5, implementation=implementation)
        actual = decode_attention.decode_attention(q, empty.append(k, v), **options, **more)
        more = dict(mask=masks.Window(5), q_offset=S - 3)
        return actual, ops.dot_product_attention(q, k, v, **options, **more)

    chex.assert_trees_all_close(*run(), rtol=1e-5, atol=1e-6)


def test_a_prompt_of_its_own_length_for_each_sequence():
    """Filled up behind: the queries that count see their own sequence alone."""
    q, k, v = normal(0, B, S, N, H), normal(1, B, S, K, H), normal(2, B, S, K, V)
    counts = jnp.array([4, 11])

    @jax.jit
    def run():
        empty = paging.PagedCache.empty(B, S, K, H, V, "float32", page_size=4)
        cache = empty.append(k, v, counts)
        o = decode_attention.decode_attention(q, cache, q_offset=empty.lengths)
        return o, ops.dot_product_attention(q, k, v, mask=masks.Causal())

    actual, expected = run()
    for b, count in enumerate(counts):
        chex.assert_trees_all_close(actual[b, :count], expected[b, :count], rtol=1e-5, atol=1e-6)


def test_latents_are_keys_whose_front_is_the_value():
    """And one query has no axis of its own."""
    q, k = normal(0, B, N, H), normal(1, B, S, 1, H)

    @jax.jit
    def run():
        empty = paging.PagedCache.empty(B, S, 1, H, None, "float32", page_size=4)
        cache = empty.append(k, None)
        actual = decode_attention.decode_attention(
            q, cache, value_dim=V, scale=0.5, return_lse=True
        )
        options = dict(scale=0.5, return_lse=True)
        expected = ops.dot_product_attention(q[:, None], k, k[..., :V], **options)
        return actual, jax.tree.map(lambda x: x[:, 0], expected)

    chex.assert_trees_all_close(*run(), rtol=1e-5, atol=1e-6)


def test_memory_is_no_second_cache():
    """What XLA takes beside the cache doesn't grow with it."""
    run = jax.jit(functools.partial(decode_attention.decode_attention, implementation="xla"))

    def bytes_beside(length):
        empty = functools.partial(paging.PagedCache.empty, 1, length, 2, 16, 16, "float32")
        cache = jax.eval_shape(functools.partial(empty, page_size=64))
        q = jax.ShapeDtypeStruct((1, 256, 2, 16), "float32")  # so many that keys aren't split
        return run.lower(q, cache).compile().memory_analysis().temp_size_in_bytes

    assert bytes_beside(2**16) <= 1.1 * bytes_beside(2**12)


def test_refuses_another_number_of_axes():
    unchecked = inspect.unwrap(decode_attention.decode_attention)
    with pytest.raises(ValueError, match=r"q of shape \(2, 8\) must be \(B N H\) or \(B T N H\)"):
        unchecked(jnp.zeros((2, 8)), paging.PagedCache.empty(2, 4, 1, 8, 8, "f4", page_size=4))
