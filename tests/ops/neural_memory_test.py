"""Both forms against the recurrence token by token; the state between pieces; padding."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import neural_memory as ops
from tests import cotangents

FORMS = [(1, 1), (1, 4), (2, 1), (3, 5)]  # depth, chunk


def inputs(depth, T):
    draw = np.random.default_rng(0)  # JAX would compile each of these operations
    x = draw.normal(size=(3, 2, T, 2, 4))
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    rate, momentum, keep = draw.uniform(0.1, 1, size=(3, 2, T, 2))
    tokens = *x, rate, np.log(momentum), np.log(keep)
    tokens = tuple(a.astype(np.float32) for a in tokens)
    return tokens, draw.normal(scale=0.5, size=(2, depth, 4, 4)).astype(np.float32)


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


@pytest.mark.parametrize(
    ("depth", "chunk", "T"), [(*form, 70) for form in FORMS] + [(1, 1, 1), (1, 4, 1)]
)
def test_equals_the_recurrence(depth, chunk, T):
    def fast(tokens, weights):
        o, state = run(tokens, weights, chunk=chunk)
        return o, state.weights, state.momentum

    def with_gradients(fn, args):
        out, vjp = jax.vjp(fn, *args)
        return out, vjp(cotangents.like(out))

    slow = lambda tokens, weights: token_by_token(tokens, weights, chunk)
    both = jax.jit(lambda *args: [with_gradients(fn, args) for fn in (fast, slow)])
    chex.assert_trees_all_close(*both(*inputs(depth, T)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("depth", "chunk"), FORMS)
def test_pieces_equal_the_whole(depth, chunk):
    """Token by token, and in pieces that end before, in and after chunks."""

    def some(state, tokens):
        o, state = ops.neural_memory(*tokens, state, chunk=chunk)
        return state, o

    @jax.jit
    def runs(tokens, weights):
        begin, os = ops.State.begin(weights, 2), []
        single = [x.swapaxes(0, 1)[:, :, None] for x in tokens]
        end, o = jax.lax.scan(some, begin, single)
        by_token = o[:, :, 0].swapaxes(0, 1), end[:2]
        for piece in zip(*(jnp.split(x, [2, 3, 12], axis=1) for x in tokens), strict=True):
            begin, o = some(begin, piece)
            os.append(o)
        by_pieces = jnp.concatenate(os, 1), begin[:2]
        whole, state = run(tokens, weights, chunk=chunk)
        return by_token, by_pieces, (whole, state[:2])

    by_token, by_pieces, whole = runs(*inputs(depth, 13))
    chex.assert_trees_all_close(by_token, whole, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(by_pieces, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("depth", "chunk"), [(1, 1), (2, 1)])
def test_padding_changes_nothing(depth, chunk):
    at = np.array([0, 1, 2, 3, 7, 8, 9, 10])
    mask = masks.Causal() & masks.Valid(jnp.asarray(np.tile(np.isin(np.arange(11), at), (2, 1))))

    @jax.jit
    def both(tokens, weights):
        o, state = run(tokens, weights, mask=mask, chunk=chunk)
        short, left = run([x[:, at] for x in tokens], weights, chunk=chunk)
        return (o[:, at], state[:2]), (short, left[:2])

    chex.assert_trees_all_close(*both(*inputs(depth, 11)), rtol=1e-4, atol=1e-5)


def test_padding_within_a_chunk_is_not_learned():
    tokens, weights = inputs(2, 8)
    valid = masks.Valid(jnp.asarray(np.tile(np.arange(8) != 5, (2, 1))))
    at_5 = np.arange(8) == 5
    other = [np.where(at_5.reshape(8, *[1] * (x.ndim - 2)), 0.5 * x - 0.1, x) for x in tokens]
    end = jax.jit(lambda tokens, weights: run(tokens, weights, mask=valid, chunk=4)[1])
    chex.assert_trees_all_equal(end(list(tokens), weights), end(other, weights))


def test_wrong_arguments_raise():
    tokens, weights = jax.tree.map(jnp.asarray, inputs(1, 3))
    with pytest.raises(ValueError, match="chunk=0 and T=3 must be at least 1"):
        run(tokens, weights, chunk=0)
    with pytest.raises(NotImplementedError, match="me can't honour Window"):
        run(tokens, weights, mask=masks.Window(2), by="me")
