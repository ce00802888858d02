"""Masks: against the equation with the dense form of the mask."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks
from attnjax.ops import decay_attention as ops

T = 21
LOG_DECAY = -jnp.array([0, 0.2, 1])
Q, K, V = jax.random.normal(jax.random.key(0), (3, 2, T, 3, 4))
PADDED = masks.Valid(jnp.ones((2, T), bool).at[0, :4].set(False).at[1, 9:13].set(False))
PACKED = masks.Segments(
    jnp.repeat(jnp.array([[0, 1, 2], [5, 4, 9]]), jnp.array([6, 1, 14]), axis=1)
)
HALVES = masks.Segments(jnp.broadcast_to(jnp.arange(T)[None] // 11, (2, T)))


def dense(mask):
    """(B N T S): how much of each key reaches each query."""
    t = jnp.arange(T)
    lag = jnp.maximum(t[:, None] - t[None, :], 0)
    return jnp.exp(LOG_DECAY[:, None, None] * lag[None])[None] * masks.dense(mask, T, T)


@pytest.mark.parametrize(
    "mask",
    [PADDED, PACKED, PADDED & PACKED, PACKED & HALVES, masks.Causal() & PADDED & PACKED],
    ids=["padded", "packed", "both", "packed twice", "all"],
)
def test_equals_the_equation_under_the_dense_mask(mask):
    w = dense(mask & masks.Causal())
    o, state = jax.jit(lambda: ops.decay_attention(Q, K, V, LOG_DECAY, mask=mask))()
    scores = jnp.einsum("BTNH,BSNH->BNTS", Q, K) * w
    chex.assert_trees_all_close(o, jnp.einsum("BNTS,BSNV->BTNV", scores, V), rtol=1e-5, atol=1e-5)
    last = jnp.einsum("BNS,BSNH,BSNV->BNHV", w[:, :, -1], K, V)
    chex.assert_trees_all_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [None, PADDED, PACKED], ids=["plain", "padded", "packed"])
def test_carry_is_what_becomes_of_an_initial_state(mask):
    start = jax.random.normal(jax.random.key(1), (2, 3, 4, 4))
    run = lambda start: ops.decay_attention(Q, K, V, LOG_DECAY, mask=mask, initial_state=start)[1]
    left = jax.jit(lambda: run(start) - run(jnp.zeros_like(start)))()
    expected = ops.carry(LOG_DECAY, T, mask=mask) * start
    chex.assert_trees_all_close(left, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [masks.Window(2), masks.Segments(PACKED.q, PACKED.q)])
def test_refuses_what_it_cannot_honour(mask):
    with pytest.raises(NotImplementedError, match=f"me can't honour {type(mask).__name__}"):
        ops.decay_attention(Q, K, V, LOG_DECAY, mask=mask, by="me")
