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
DRAW = np.random.default_rng(0)
Q, K, V = (jnp.asarray(DRAW.normal(scale=0.5, size=(2, T, 3, 4)), "float32") for _ in "qkv")
HEAD, CHANNEL = (jnp.asarray(-DRAW.random((2, T, 3, n)), "float32") for n in (1, 4))
BETA = jnp.asarray(DRAW.random((2, T, 3)), "float32")
GATES = {
    "head": dict(log_decay=HEAD),
    "channel": dict(log_decay=CHANNEL),
    "delta": dict(beta=BETA),
    "delta, head": dict(log_decay=HEAD, beta=BETA),
}
BEGINS = (0, 6, 7, T)
PACKED = masks.Segments(
    jnp.asarray(np.repeat(np.array([[0, 1, 2], [5, 4, 9]]), np.diff(BEGINS), axis=1))
)
SEEN = np.ones((2, T), bool)
SEEN[0, :4] = SEEN[1, 9:13] = False
PADDED = masks.Valid(jnp.asarray(SEEN))


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
    args = (Q, K, V, GATES[gate])

    def without(b):
        one = jax.tree.map(lambda x: x[b : b + 1, np.flatnonzero(SEEN[b])], args)
        return jax.tree.map(lambda x: x[0], run(one))

    both = jax.jit(lambda: (run(args, PADDED), [without(0), without(1)]))
    (o, state), short = jax.device_get(both())
    for b in range(2):
        chex.assert_trees_all_close((o[b][SEEN[b]], state[b]), short[b], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [None, PADDED, PACKED], ids=["plain", "padded", "packed"])
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_carry_is_what_becomes_of_an_initial_state(gate, mask):
    start = np.random.default_rng(1).standard_normal((2, 3, 4, 4), "f4")
    decay = GATES[gate]["log_decay"]
    final = lambda start: run((Q, K, V, GATES[gate]), mask, start)[1]

    @jax.jit
    def both(start):
        left = final(start) - final(jnp.zeros_like(start))
        return left, ops.carry(decay, mask=mask) * start

    chex.assert_trees_all_close(*both(start), rtol=1e-5, atol=1e-5)


def test_refuses_what_it_cannot_honour():
    with pytest.raises(NotImplementedError, match="me can't honour Window"):
        ops.linear_recurrence(Q, K, V, mask=masks.Window(2), by="me")
