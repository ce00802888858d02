"""Only what is particular to S2-Attention; the rest is tests/conformance_test.py."""

import functools

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks
from attnjax.sparse import s2_attention as lib
from tests.sparse import helpers


def weights(T, N, K, **options):
    matrix = functools.partial(edit.matrix, lib.s2_attention)
    return helpers.program(matrix, **options)(*helpers.example(T, N, K))[0]


@pytest.mark.parametrize("stride", [2, 4])
def test_heads_see_the_whole_context_between_them(stride):
    options = dict(block=3, local=1, stride=stride)
    seen = weights(40, 4, 4, **options) > 0
    np.testing.assert_array_equal(seen.any(0), np.tri(40, dtype=bool))
    assert not (seen == seen[:1]).all()
    far = seen[:, 36:, :36].reshape(4, 4, 12, 3).any((1, 3))
    assert (far.sum(-1) == 12 // stride).all()


def test_query_heads_of_a_key_head_share_its_shard():
    seen = weights(24, 4, 2, block=2, local=1, stride=2) > 0
    np.testing.assert_array_equal(seen[::2], seen[1::2])
    assert not (seen[0] == seen[2]).all()


def test_a_key_that_is_not_seen_once_is_never_seen_again():
    for options in (dict(local=1, stride=3), dict(local=2, stride=4)):
        seen = weights(36, 4, 4, block=3, **options) > 0
        lost = np.cumsum(~seen & np.tri(36, dtype=bool), 1) > 0
        assert not (seen & lost).any()


@pytest.mark.parametrize("options", [dict(local=9, stride=5), dict(local=1, stride=1)])
def test_all_blocks_are_full_attention(options):
    args = helpers.example(17, 4, 4)
    actual = helpers.program(lib.s2_attention, block=2, **options)(*args)
    chex.assert_trees_all_close(actual, helpers.causal(*args), atol=1e-6)


def test_blocks_that_are_not_seen_are_not_computed():
    """Keys that are NaN would spoil a tile that is computed and masked."""
    q, k, v = helpers.normal(3, 1, 640, 1, 8)
    options = dict(block=64, local=1, stride=5)  # far blocks 4 and 9
    skipped = (np.arange(640) // 64 % 5 != 4) & (np.arange(640) < 512)
    run = helpers.program(lib.s2_attention, **options)
    spoilt = (np.where(skipped[None, :, None, None], np.float32(np.nan), x) for x in (k, v))
    chex.assert_trees_all_equal(run(q, *spoilt)[:, 576:], run(q, k, v)[:, 576:])


def test_streams_from_a_cache_that_forgets():
    """Pieces of more tokens than the cache has places, of one, and of few at each of them."""
    options = dict(num_heads=4, num_kv_heads=2, head_dim=8, block=2, local=2, stride=4)
    module = lib.S2Attention(**options, rotary_base=100.0)
    state = helpers.assert_streams(module, helpers.normal(2, 30, 16), (1, 14), 30)
    assert state.k.shape[1] == 2 * (2 + 4) and state.length == 30


def test_refuses_what_it_cannot_do():
    q, k, v = (jnp.asarray(x) for x in helpers.normal(3, 1, 6, 2, 4))
    for mask in (masks.Window(2), masks.Segments(jnp.zeros((1, 6), int))):
        with pytest.raises(NotImplementedError, match="s2_attention can't honour"):
            lib.s2_attention(q, k, v, mask=mask)
    positions = jnp.arange(6), jnp.arange(6)[:, None].repeat(2, 1)
    with pytest.raises(NotImplementedError, match="with positions can't honour Valid"):
        lib.s2_attention(q, k, v, mask=masks.Valid(jnp.ones((1, 6), bool)), positions=positions)
    for options in (dict(block=0), dict(local=0), dict(stride=0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            lib.s2_attention(q, k, v, **options)
    with pytest.raises(ValueError, match="must be as many"):
        lib.s2_attention(q[:, :3], k, v)
