"""Both forms against the recurrence token by token; the state between pieces; padding."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import neural_memory as ops

KEY = jax.random.key(0)
FORMS = [(1, 1), (1, 4), (2, 1), (3, 5)]  # depth, chunk
every_form = pytest.mark.parametrize(("depth", "chunk"), FORMS)


def inputs(depth, T):
    keys = jax.random.split(KEY, 3)
    x = jax.random.normal(keys[0], (3, 2, T, 2, 4))
    q, k, v = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    gates = jax.random.uniform(keys[1], (3, 2, T, 2), minval=0.1)
    weights = jax.random.normal(keys[2], (2, depth, 4, 4)) / 2
    return (q, k, v, gates[0], jnp.log(gates[1]), jnp.log(gates[2])), weights


def run(tokens, weights, state=None, **options):
    state = ops.State.begin(weights, 2) if state is None else state
    return ops.neural_memory(*tokens, state, **options)


def token_by_token(tokens, weights, chunk):
    """Autodiff of the equations."""

    def read(M, x):
        x = jnp.einsum("BNHV,BNH->BNV", M[:, :, 0], x)
        for i in range(1, M.shape[2]):
            x = jnp.einsum("BNHV,BNH->BNV", M[:, :, i], x * jax.nn.sigmoid(x))
        return x

    def step(carry, x):
        (M, S, anchor), (t, q, k, v, *gates) = carry, x
        rate, momentum, keep = (gate[..., None, None, None] for gate in gates)
        anchor = jnp.where(t % chunk == 0, M, anchor)
        gradient = jax.grad(lambda M: ((read(M, k) - v) ** 2).sum() / 2)(anchor)
        S = jnp.exp(momentum) * S - rate * gradient
        M = jnp.exp(keep) * M + S
        return (M, S, anchor), read(M, q)

    M = jnp.broadcast_to(weights[None], (2, *weights.shape))
    xs = (jnp.arange(tokens[0].shape[1]), *(x.swapaxes(0, 1) for x in tokens))
    (M, S, _), o = jax.lax.scan(step, (M, jnp.zeros_like(M), M), xs)
    return o.swapaxes(0, 1), M, S


@every_form
@pytest.mark.parametrize("T", [1, 70])
def test_equals_the_recurrence(depth, chunk, T):
    args = inputs(depth, T)

    def fast(tokens, weights):
        o, state = run(tokens, weights, chunk=chunk)
        return o, state.weights, state.momentum

    def with_gradients(fn):
        out, vjp = jax.vjp(fn, *args)
        return out, vjp(jax.tree.map(lambda x: jax.random.normal(KEY, x.shape), out))

    slow = lambda tokens, weights: token_by_token(tokens, weights, chunk)
    actual, expected = jax.jit(lambda: (with_gradients(fast), with_gradients(slow)))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


@every_form
@pytest.mark.parametrize("pieces", [(1,) * 13, (2, 1, 9, 1)])
def test_pieces_equal_the_whole(depth, chunk, pieces):
    tokens, weights = inputs(depth, 13)

    @jax.jit
    def in_pieces():
        state, os = ops.State.begin(weights, 2), []
        cuts = [jnp.split(x, np.cumsum(pieces)[:-1], axis=1) for x in tokens]
        for piece in zip(*cuts, strict=True):
            o, state = ops.neural_memory(*piece, state, chunk=chunk)
            os.append(o)
        return jnp.concatenate(os, 1), state[:2]

    o, state = jax.jit(lambda: run(tokens, weights, chunk=chunk))()
    chex.assert_trees_all_close(in_pieces(), (o, state[:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("depth", "chunk"), [(1, 1), (2, 1)])
def test_padding_changes_nothing(depth, chunk):
    tokens, weights = inputs(depth, 11)
    valid = jnp.ones((2, 11), bool).at[:, 4:7].set(False)
    at = np.flatnonzero(valid[0])
    o, state = run(tokens, weights, mask=masks.Causal() & masks.Valid(valid), chunk=chunk)
    short, left = run(jax.tree.map(lambda x: x[:, at], tokens), weights, chunk=chunk)
    chex.assert_trees_all_close((o[:, at], state[:2]), (short, left[:2]), rtol=1e-4, atol=1e-5)


def test_padding_within_a_chunk_is_not_learned():
    tokens, weights = inputs(2, 8)
    valid = masks.Valid(jnp.ones((2, 8), bool).at[:, 5].set(False))
    other = jax.tree.map(lambda x: x.at[:, 5].set(0.5 * x[:, 5] - 0.1), tokens)
    states = [run(x, weights, mask=valid, chunk=4)[1] for x in (tokens, other)]
    chex.assert_trees_all_equal(*states)


def test_wrong_arguments_raise():
    tokens, weights = inputs(1, 3)
    with pytest.raises(ValueError, match="chunk=0 and T=3 must be at least 1"):
        run(tokens, weights, chunk=0)
    with pytest.raises(NotImplementedError, match="me can't honour Window"):
        run(tokens, weights, mask=masks.Window(2), by="me")
