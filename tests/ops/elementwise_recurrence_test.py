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
BEGINS = (0, 5, 6, T)
PACKED = masks.Segments(
    jnp.asarray(np.repeat(np.array([[0, 1, 2], [5, 4, 9]]), np.diff(BEGINS), axis=1))
)
SEEN = np.ones((2, T), bool)
SEEN[0, :4] = SEEN[1, 7:10] = False
PADDED = masks.Valid(jnp.asarray(SEEN))


def inputs(kind):
    """Factors of size 0.5 to 1, inputs and a state."""
    draw, shape = np.random.default_rng(0), (2, T, 2, 3)
    size, x = draw.uniform(0.5, 1, shape), draw.normal(size=shape)
    state = draw.normal(size=(2, 2, 3))
    if kind == "real":
        return tuple(jnp.asarray(x, "float32") for x in (size, x, state))
    turned = size * np.exp(1j * draw.normal(size=shape)), x * (1 + 0.5j), state * (1 - 1j)
    return tuple(jnp.asarray(x, "complex64") for x in turned)


def token_by_token(a, x, state):
    def step(state, now):
        state = now[0] * state + now[1]
        return state, state

    state, hs = jax.lax.scan(step, state, (a.swapaxes(0, 1), x.swapaxes(0, 1)))
    return hs.swapaxes(0, 1), state


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_equals_the_recurrence(kind):
    """In chunks of one token, of some and of more than there are."""

    def with_gradients(fn, args):
        out, vjp = jax.vjp(fn, *args)
        return out, vjp(jax.tree.map(lambda x: x * jnp.arange(x.size).reshape(x.shape), out))

    fast = lambda chunk: (
        lambda a, x, h: ops.elementwise_recurrence(a, x, initial_state=h, chunk=chunk)
    )
    fns = fast(1), fast(4), fast(128), token_by_token
    run = jax.jit(lambda *args: [with_gradients(fn, args) for fn in fns])
    *actual, expected = run(*inputs(kind))
    for each in actual:
        chex.assert_trees_all_close(each, expected, rtol=1e-4, atol=1e-5)


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
    a, x, _ = inputs("real")

    @jax.jit
    def both(a, x):
        some = [(slice(b, b + 1), np.flatnonzero(SEEN[b])) for b in range(2)]
        short = [ops.elementwise_recurrence(a[at], x[at]) for at in some]
        return ops.elementwise_recurrence(a, x, mask=PADDED), short

    (h, state), short = jax.device_get(both(a, x))
    for b in range(2):
        expected = jax.tree.map(lambda x: x[0], short[b])
        chex.assert_trees_all_close((h[b, SEEN[b]], state[b]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", [None, PADDED, PACKED], ids=["plain", "padded", "packed"])
def test_carry_is_what_becomes_of_an_initial_state(mask):
    a, x, start = inputs("complex")
    final = lambda start: ops.elementwise_recurrence(a, x, mask=mask, initial_state=start)[1]

    @jax.jit
    def both(start):
        left = final(start) - final(jnp.zeros_like(start))
        return left, ops.carry(a, mask=mask) * start

    chex.assert_trees_all_close(*both(start), rtol=1e-5, atol=1e-5)


def test_sums_in_float32_or_complex64():
    a, x, start = inputs("complex")
    dtypes = lambda *args: jax.tree.map(
        lambda x: x.dtype,
        jax.eval_shape(lambda a, x, h: ops.elementwise_recurrence(a, x, initial_state=h), *args),
    )
    small, factor = (jnp.asarray(np.abs(y), "bfloat16") for y in (x, a))
    assert dtypes(factor, small, None) == (jnp.float32, jnp.float32)
    assert dtypes(jnp.asarray(np.abs(a)), small, start)[0] == jnp.complex64


def test_refuses_what_it_cannot_honour():
    a, x, _ = inputs("real")
    with pytest.raises(NotImplementedError, match="me can't honour Window"):
        ops.elementwise_recurrence(a, x, mask=masks.Window(2), by="me")
    with pytest.raises(ValueError, match="must be alike, not empty, and chunk=0 >= 1"):
        ops.elementwise_recurrence(a, x, chunk=0)
