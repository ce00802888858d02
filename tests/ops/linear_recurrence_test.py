"""Masks: against the same call on each document alone, without its padding."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import linear_recurrence as ops

T = 21
KEYS = jax.random.split(jax.random.key(0), 4)
Q, K, V = jax.random.normal(KEYS[0], (3, 2, T, 3, 4)) / 2
HEAD, CHANNEL = (
    -jax.random.uniform(key, (2, T, 3, n)) for key, n in zip(KEYS[1:3], (1, 4), strict=True)
)
BETA = jax.random.uniform(KEYS[3], (2, T, 3))
GATES = {
    "head": dict(log_decay=HEAD),
    "channel": dict(log_decay=CHANNEL),
    "delta": dict(beta=BETA),
    "delta, head": dict(log_decay=HEAD, beta=BETA),
}
BEGINS = (0, 6, 7, T)
PACKED = masks.Segments(
    jnp.repeat(jnp.array([[0, 1, 2], [5, 4, 9]]), jnp.diff(jnp.array(BEGINS)), axis=1)
)
PADDED = masks.Valid(jnp.ones((2, T), bool).at[0, :4].set(False).at[1, 9:13].set(False))


def run(args, mask=None, start=None):
    q, k, v, gates = args
    return ops.linear_recurrence(q, k, v, **gates, mask=mask, initial_state=start)


def cut(args, at):
    return jax.tree.map(lambda x: x[:, at], args)


@pytest.mark.parametrize("gate", GATES)
def test_a_document_is_alone(gate):
    args = (Q, K, V, GATES[gate])

    def apart():
        pieces = [run(cut(args, slice(*x))) for x in itertools.pairwise(BEGINS)]
        return jnp.concatenate([o for o, _ in pieces], 1), pieces[-1][1]

    both = jax.jit(lambda: (run(args, masks.Causal() & PACKED), apart()))()
    chex.assert_trees_all_close(*both, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_padding_changes_nothing(gate):
    args, kept = (Q, K, V, GATES[gate]), np.asarray(PADDED.keys)

    def without(b):
        one = jax.tree.map(lambda x: x[b : b + 1, np.flatnonzero(kept[b])], args)
        return jax.tree.map(lambda x: x[0], run(one))

    (o, state), short = jax.jit(lambda: (run(args, PADDED), [without(0), without(1)]))()
    for b in range(2):
        chex.assert_trees_all_close((o[b][kept[b]], state[b]), short[b], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [None, PADDED, PACKED], ids=["plain", "padded", "packed"])
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_carry_is_what_becomes_of_an_initial_state(gate, mask):
    start = jax.random.normal(jax.random.key(1), (2, 3, 4, 4))
    final = lambda start: run((Q, K, V, GATES[gate]), mask, start)[1]
    left = jax.jit(lambda: final(start) - final(jnp.zeros_like(start)))()
    expected = ops.carry(GATES[gate]["log_decay"], mask=mask) * start
    chex.assert_trees_all_close(left, expected, rtol=1e-5, atol=1e-5)


def test_refuses_what_it_cannot_honour():
    with pytest.raises(NotImplementedError, match="me can't honour Window"):
        ops.linear_recurrence(Q, K, V, mask=masks.Window(2), by="me")
