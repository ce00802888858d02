"""Masks: against the equation with the dense form of the mask."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import decay_attention as ops

T = 21
LOG_DECAY = jnp.asarray([0, -0.2, -1], "float32")
DRAW = np.random.default_rng(0).standard_normal
Q, K, V = (jnp.asarray(DRAW((2, T, 3, 4)), "float32") for _ in "qkv")
SEEN = np.ones((2, T), bool)
SEEN[0, :4] = SEEN[1, 9:13] = False
PADDED = masks.Valid(jnp.asarray(SEEN))
PACKED = masks.Segments(
    jnp.asarray(np.repeat(np.array([[0, 1, 2], [5, 4, 9]]), [6, 1, 14], axis=1), jnp.int32)
)
HALVES = masks.Segments(jnp.asarray(np.tile(np.arange(T) // 11, (2, 1)), jnp.int32))


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
    def slow():
        w = dense(mask & masks.Causal())
        o = jnp.einsum("BNTS,BSNV->BTNV", jnp.einsum("BTNH,BSNH->BNTS", Q, K) * w, V)
        return o, jnp.einsum("BNS,BSNH,BSNV->BNHV", w[:, :, -1], K, V)

    fast = lambda: ops.decay_attention(Q, K, V, LOG_DECAY, mask=mask)
    chex.assert_trees_all_close(*jax.jit(lambda: (fast(), slow()))(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [None, PADDED, PACKED], ids=["plain", "padded", "packed"])
def test_carry_is_what_becomes_of_an_initial_state(mask):
    start = np.random.default_rng(1).standard_normal((2, 3, 4, 4), "f4")
    run = lambda start: ops.decay_attention(Q, K, V, LOG_DECAY, mask=mask, initial_state=start)[1]

    @jax.jit
    def both(start):
        left = run(start) - run(jnp.zeros_like(start))
        return left, ops.carry(LOG_DECAY, T, mask=mask) * start

    chex.assert_trees_all_close(*both(start), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [masks.Window(2), masks.Segments(PACKED.q, PACKED.q)])
def test_refuses_what_it_cannot_honour(mask):
    with pytest.raises(NotImplementedError, match=f"me can't honour {type(mask).__name__}"):
        ops.decay_attention(Q, K, V, LOG_DECAY, mask=mask, by="me")
