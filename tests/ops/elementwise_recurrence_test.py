"""Against the recurrence token by token, and each document alone, without its padding."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import elementwise_recurrence as ops

T = 13
KEYS = jax.random.split(jax.random.key(0), 4)
BEGINS = (0, 5, 6, T)
PACKED = masks.Segments(
    jnp.repeat(jnp.array([[0, 1, 2], [5, 4, 9]]), jnp.diff(jnp.array(BEGINS)), axis=1)
)
PADDED = masks.Valid(jnp.ones((2, T), bool).at[0, :4].set(False).at[1, 7:10].set(False))


def inputs(kind):
    """Factors of size 0.5 to 1, inputs and a state."""
    size = jax.random.uniform(KEYS[0], (2, T, 2, 3), minval=0.5)
    x = jax.random.normal(KEYS[1], size.shape)
    state = jax.random.normal(KEYS[2], (2, 2, 3))
    if kind == "real":
        return size, x, state
    turn = jnp.exp(1j * jax.random.normal(KEYS[3], size.shape))
    return size * turn, x * (1 + 0.5j), state * (1 - 1j)


def token_by_token(a, x, state):
    hs = []
    for t in range(T):
        state = a[:, t] * state + x[:, t]
        hs.append(state)
    return jnp.stack(hs, 1), state


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("chunk", [1, 4, 128])
def test_equals_the_recurrence(kind, chunk):
    def with_gradients(fn):
        out, vjp = jax.vjp(fn, *args)
        return out, vjp(jax.tree.map(lambda x: x * jnp.arange(x.size).reshape(x.shape), out))

    args = inputs(kind)
    fast = lambda a, x, h: ops.elementwise_recurrence(a, x, initial_state=h, chunk=chunk)
    actual, expected = jax.jit(lambda: (with_gradients(fast), with_gradients(token_by_token)))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_a_document_is_alone(kind):
    a, x, _ = inputs(kind)

    def apart():
        cut = [slice(*piece) for piece in itertools.pairwise(BEGINS)]
        hs = [ops.elementwise_recurrence(a[:, at], x[:, at]) for at in cut]
        return jnp.concatenate([h for h, _ in hs], 1), hs[-1][1]

    packed = lambda: ops.elementwise_recurrence(a, x, mask=masks.Causal() & PACKED)
    chex.assert_trees_all_close(*jax.jit(lambda: (packed(), apart()))(), rtol=1e-5, atol=1e-6)


def test_padding_changes_nothing():
    (a, x, _), kept = inputs("real"), np.asarray(PADDED.keys)
    h, state = ops.elementwise_recurrence(a, x, mask=PADDED)
    for b in range(2):
        at = np.flatnonzero(kept[b])
        short = ops.elementwise_recurrence(a[b : b + 1, at], x[b : b + 1, at])
        expected = jax.tree.map(lambda x: x[0], short)
        chex.assert_trees_all_close((h[b, at], state[b]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", [None, PADDED, PACKED], ids=["plain", "padded", "packed"])
def test_carry_is_what_becomes_of_an_initial_state(mask):
    a, x, start = inputs("complex")
    final = lambda start: ops.elementwise_recurrence(a, x, mask=mask, initial_state=start)[1]
    left = jax.jit(lambda: final(start) - final(jnp.zeros_like(start)))()
    chex.assert_trees_all_close(left, ops.carry(a, mask=mask) * start, rtol=1e-5, atol=1e-5)


def test_sums_in_float32_or_complex64():
    a, x, start = inputs("complex")
    small = x.real.astype(jnp.bfloat16)
    h, last = ops.elementwise_recurrence(abs(a).astype(jnp.bfloat16), small)
    assert h.dtype == last.dtype == jnp.float32
    assert ops.elementwise_recurrence(abs(a), small, initial_state=start)[0].dtype == jnp.complex64


def test_refuses_what_it_cannot_honour():
    a, x, _ = inputs("real")
    with pytest.raises(NotImplementedError, match="me can't honour Window"):
        ops.elementwise_recurrence(a, x, mask=masks.Window(2), by="me")
    with pytest.raises(ValueError, match="must be alike, not empty, and chunk=0 >= 1"):
        ops.elementwise_recurrence(a, x, chunk=0)
