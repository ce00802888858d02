import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.ops.selected_block_attention import selected_block_attention
from tests import cost

KEY = jax.random.key(0)
B, N, K, H, V = 2, 4, 2, 8, 6


def example(T, S, A, block, *, same=False):
    """Arguments with random blocks for each query, or the same block for all."""
    keys = jax.random.split(KEY, 4)
    draw = lambda key, *shape: jax.random.normal(key, (B, *shape))
    score = jax.random.uniform(keys[3], (B, 1 if same else T, 1 if same else N, -(-S // block)))
    selected = jnp.broadcast_to(jax.lax.top_k(score, A)[1], (B, T, N, A))
    q, k, v = draw(keys[0], T, N, H), draw(keys[1], S, K, H), draw(keys[2], S, K, V)
    return q, k, v, selected


def dense(q, k, v, selected, *, block, mask=None, q_offset=0):
    """Full attention under the selection written out as a mask."""
    T, S = q.shape[1], k.shape[1]
    of_key = jnp.arange(S)[None, None, None, :, None] // block
    seen = (selected[:, :, :, None, :] == of_key).any(-1).swapaxes(1, 2)
    seen = seen & masks.dense(mask, T, S, q_offset=q_offset)
    return ops.dot_product_attention(q, k, v, mask=masks.Dense(seen), implementation="dense")


def assert_same(args, **options):
    def both(fn):
        out, pull = jax.vjp(lambda *x: fn(*x, args[3], **options), *args[:3])
        return out, pull(jnp.cos(out))

    actual, expected = jax.jit(lambda: (both(selected_block_attention), both(dense)))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "T, S, A, block, same",
    [(13, 13, 2, 4, False), (13, 13, 2, 4, True), (5, 23, 3, 4, False), (1, 9, 2, 3, False)],
    ids=["own blocks", "one block for all", "more keys than queries", "one query"],
)
def test_equals_dense_attention_under_the_selection(T, S, A, block, same):
    assert_same(example(T, S, A, block, same=same), block=block)


def test_honours_masks_from_an_offset():
    T, S = 7, 17
    valid = jnp.arange(S)[None] % 5 != jnp.array([2, 3])[:, None]
    ids = jnp.arange(S)[None] // jnp.array([6, 20])[:, None]
    mask = masks.Causal() & masks.Valid(valid) & masks.Segments(ids)
    assert_same(example(T, S, 3, 4), block=4, mask=mask, q_offset=S - T)


def test_refuses_masks_by_head():
    with pytest.raises(NotImplementedError, match="can't honour Dense"):
        selected_block_attention(
            *example(4, 4, 1, 2), block=2, mask=masks.Dense(jnp.ones((1, N, 4, 4), bool))
        )


def test_a_block_that_nobody_selects_is_not_read():
    q, k, v, _ = example(1, 40, 3, 4)
    selected = jnp.broadcast_to(jnp.array([7, 2, 4]), (B, 1, N, 3))
    others = ~np.isin(np.arange(40) // 4, [7, 2, 4])[None, :, None, None]
    k, v = (jnp.where(others, jnp.nan, x) for x in (k, v))
    run = jax.jit(functools.partial(selected_block_attention, block=4))
    assert jnp.isfinite(run(q, k, v, selected)).all()


def test_work_is_that_of_one_block_more_than_selected():
    def count(T, A, block, gradient):
        args = jax.eval_shape(lambda: example(T, T, A, block))
        fn = functools.partial(selected_block_attention, block=block)
        loss = jax.grad(lambda *x: fn(*x).sum(), (0, 1, 2))
        return cost.operations(loss if gradient else fn, *args)

    pairs = 4096 * 3 * 64  # of queries and keys, were A + 1 blocks seen by every query
    assert count(4096, 2, 64, False) < 1.6 * B * N * pairs * 2 * (H + V)
    for gradient in (False, True):
        assert count(4096, 2, 64, gradient) < 2.1 * count(2048, 2, 64, gradient)
