"""Against the recurrence, token by token: outputs, final state, gradients; and what is held."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import selective_scan as kernels
from pallas_kernels.selective_scan import xla
from tests import cost

KEY = jax.random.key(0)
N, H, M = 3, 4, 5


def inputs(T, dtype=jnp.float32, strength=1.0):
    keys = jax.random.split(KEY, 6)
    x, delta = jax.random.normal(keys[0], (2, 2, T, N, H))
    b, c = jax.random.normal(keys[1], (2, 2, T, N, M))
    args = dict(x=x, delta=strength * jax.nn.softplus(delta - 1), b=b, c=c)
    args["rate"] = -jnp.exp(jax.random.normal(keys[2], (N, H, M)))
    args["skip"] = jax.random.normal(keys[3], (N, H))
    state = jax.random.normal(keys[4], (2, N, H, M))
    return jax.tree.map(lambda a: a.astype(dtype), args) | dict(initial_state=state)


def packed(T):
    """Segments that begin within chunks of 8 and at their borders, one of a single token."""
    first = jnp.isin(jnp.arange(T), jnp.array([3, 4, 16, 21]))
    second = jnp.isin(jnp.arange(T), jnp.array([8, 30]))
    return jnp.cumsum(jnp.stack([first, second]), 1)


def oracle(x, delta, rate, b, c, skip, initial_state, segments):
    def step(h, now):
        x, delta, b, c, same = now
        h = jnp.where(same[:, None, None, None], h, 0)
        h = jnp.exp(jnp.einsum("BNH,NHM->BNHM", delta, rate)) * h
        h = h + jnp.einsum("BNH,BNH,BNM->BNHM", delta, x, b)
        y = jnp.einsum("BNHM,BNM->BNH", h, c) + jnp.einsum("NH,BNH->BNH", skip, x)
        return h, y

    same = jnp.diff(segments, axis=1, prepend=segments[:, :1]) == 0
    xs = jax.tree.map(lambda a: a.swapaxes(0, 1), (x, delta, b, c, same))
    state, y = jax.lax.scan(step, initial_state, xs)
    return y.swapaxes(0, 1), state


def with_gradients(fn, args):
    """Outputs, and gradients by random cotangents of both the output and the final state."""
    out, vjp = jax.vjp(lambda args: fn(**args), args)
    keys = jax.random.split(KEY)
    return out, vjp(tuple(jax.random.normal(k, a.shape) for k, a in zip(keys, out, strict=True)))


def test_tokens_at_once_equal_tokens_in_turn():
    decay, added = jax.random.uniform(KEY, (2, 2, 13, N, H, M))
    state = jax.random.normal(KEY, (2, N, H, M))
    both = (jax.jit(form)(decay, added, state) for form in (xla.at_once, xla.in_turn))
    chex.assert_trees_all_close(*both, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("T", "segmented"), [(1, True), (32, False), (37, True)])
def test_equals_the_recurrence(T, segmented):
    args, segments = inputs(T), packed(T) if segmented else None
    fn = functools.partial(kernels.selective_scan, segments=segments, chunk=8)
    slow = functools.partial(oracle, segments=packed(T) * segmented)
    actual, expected = jax.jit(lambda: (with_gradients(fn, args), with_gradients(slow, args)))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_size_of_a_chunk_changes_nothing():
    args = inputs(70)
    run = lambda chunk: kernels.selective_scan(**args, chunk=chunk)
    one, odd, large = jax.jit(lambda: [run(chunk) for chunk in (1, 24, 64)])()
    chex.assert_trees_all_close(one, large, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(odd, large, rtol=1e-5, atol=1e-5)


def test_state_leads_from_one_piece_to_the_next():
    args = inputs(20)
    by_token = {name: args[name] for name in ("x", "delta", "b", "c")}

    @jax.jit
    def run():
        piece = lambda *ends: args | {name: a[:, slice(*ends)] for name, a in by_token.items()}
        first, state = kernels.selective_scan(**piece(0, 7))
        second, end = kernels.selective_scan(**piece(7, 20) | dict(initial_state=state))
        return (jnp.concatenate([first, second], 1), end), kernels.selective_scan(**args)

    chex.assert_trees_all_close(*run(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_states_of_all_tokens_are_never_held(backward):
    """No array has T N H M entries: the largest is of a chunk's states, or of all inputs."""
    run = lambda args: kernels.selective_scan(**args)[0].sum()
    fn = jax.grad(run) if backward else run
    args = jax.eval_shape(lambda: inputs(4096))
    assert cost.largest_array(fn, args) <= 2 * 4096 * N * M  # of b and c


def test_no_step_overflows():
    args = inputs(40, strength=1e4)
    for leaf in jax.tree.leaves(jax.jit(lambda: with_gradients(kernels.selective_scan, args))()):
        assert jnp.isfinite(leaf).all()


def test_bfloat16_goes_in_and_out_with_a_float32_state():
    args = inputs(20, jnp.bfloat16)
    raised = {k: a.astype(jnp.float32) for k, a in args.items()}
    y, state = jax.jit(lambda: kernels.selective_scan(**args))()
    exact, exact_state = jax.jit(lambda: kernels.selective_scan(**raised))()
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    chex.assert_trees_all_equal(y, exact.astype(jnp.bfloat16))
    chex.assert_trees_all_close(state, exact_state, rtol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(chunk=0), "chunk=0 must be at least 1"),
        (dict(x=jnp.zeros((2, 0, N, H))), "must have at least one token"),
        (
            dict(delta=jnp.zeros((2, 8, N, H))),
            r"delta of shape \(2, 8, 3, 4\) must .* \(2, 9, 3, 4\)",
        ),
        (dict(rate=jnp.zeros((N, M, H))), r"rate of shape \(3, 5, 4\) must have shape \(3, 4, 5\)"),
        (dict(c=jnp.zeros((2, 9, N, 6))), r"c of shape \(2, 9, 3, 6\) must have .* \(2, 9, 3, 5\)"),
        (dict(segments=jnp.zeros((2, 8), int)), r"segments of shape \(2, 8\) must .* \(2, 9\)"),
        (dict(initial_state=jnp.zeros((2, N, M, H))), r"initial_state of .* \(2, 3, 4, 5\)"),
    ],
)
def test_wrong_arguments_raise(wrong, message):
    unchecked = inspect.unwrap(kernels.selective_scan)  # by the annotations, as outside of tests
    with pytest.raises(ValueError, match=message):
        unchecked(**inputs(9) | wrong)
