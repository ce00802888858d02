"""Every gate against the recurrence, token by token: outputs, final state, gradients."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnjax.core import sharding
from pallas_kernels import linear_recurrence as kernels
from pallas_kernels import placing
from pallas_kernels import segments as documents
from pallas_kernels.linear_recurrence import mosaic_tpu, xla

KEY = jax.random.key(0)
GATES = {
    "none": dict(),
    "head": dict(log_decay=1),
    "channel": dict(log_decay=8),
    "delta": dict(beta=True),
    "delta, head": dict(log_decay=1, beta=True),
    "delta, channel": dict(log_decay=8, beta=True),
}


def inputs(gate, T, dtype=jnp.float32, N=3, V=5, strength=3.0):
    """Keys of norm 1, decays from none to `strength` a token."""
    keys = jax.random.split(KEY, 5)
    q, k = jax.random.normal(keys[0], (2, 2, T, N, 8))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    v = jax.random.normal(keys[1], (2, T, N, V))
    args = dict(q=q, k=k, v=v, initial_state=jax.random.normal(keys[2], (2, N, 8, V)))
    if "log_decay" in GATES[gate]:
        decay = jax.random.uniform(keys[3], (2, T, N, GATES[gate]["log_decay"]))
        args["log_decay"] = -strength * decay**4
    if "beta" in GATES[gate]:
        args["beta"] = jax.random.uniform(keys[4], (2, T, N), maxval=2.0)
    state = args.pop("initial_state")
    return jax.tree.map(lambda x: x.astype(dtype), args) | dict(initial_state=state)


def packed(T):
    """Segments that begin within chunks of 16 and at their borders, one of a single token."""
    first = jnp.isin(jnp.arange(T), jnp.array([3, 4, 16, 21]))
    second = jnp.isin(jnp.arange(T), jnp.array([30, 32]))
    return jnp.cumsum(jnp.stack([first, second]), 1)


def oracle(q, k, v, initial_state, segments, log_decay=None, beta=None):
    log_decay = jnp.zeros_like(q[..., :1]) if log_decay is None else log_decay

    def step(state, x):
        q, k, v, log_decay, beta, same = x
        state = jnp.where(same[:, None, None, None], jnp.exp(log_decay)[..., None] * state, 0)
        if beta is not None:
            stored = jnp.einsum("BNH,BNHV->BNV", k, state)
            v = beta[..., None] * (v - stored)
        state = state + jnp.einsum("BNH,BNV->BNHV", k, v)
        return state, jnp.einsum("BNH,BNHV->BNV", q, state)

    same = jnp.diff(segments, axis=1, prepend=segments[:, :1]) == 0
    xs = jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, log_decay, beta, same))
    state, o = jax.lax.scan(step, initial_state, xs)
    return o.swapaxes(0, 1), state


def with_gradients(fn, args):
    """Outputs, and gradients by random cotangents of both the output and the final state."""
    out, vjp = jax.vjp(lambda args: fn(**args), args)
    keys = jax.random.split(KEY)
    return out, vjp(tuple(jax.random.normal(k, x.shape) for k, x in zip(keys, out, strict=True)))


def assert_close(actual, expected):
    """Within 1e-5 of a typical entry: a sum of many terms has the rounding of their size."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-5 * float(jnp.sqrt(jnp.mean(b**2))))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("T", "segmented", "implementation"),
    [
        (48, False, None),
        (37, True, None),
        (37, True, "xla"),
        (37, True, "interpret"),
        (1, True, "interpret"),
    ],
)
def test_equals_the_recurrence(gate, T, segmented, implementation):
    args, segments = inputs(gate, T), packed(T) if segmented else None
    fn = functools.partial(
        kernels.linear_recurrence, segments=segments, chunk=32, implementation=implementation
    )
    slow = functools.partial(oracle, segments=packed(T) * segmented)
    actual, expected = jax.jit(lambda: (with_gradients(fn, args), with_gradients(slow, args)))()
    assert_close(actual, expected)


@pytest.mark.parametrize("implementation", [None, "interpret"])
def test_gates_at_their_ends(implementation):
    """beta of 0 and 2, no decay and one that forgets at once, keys that stay the same."""
    args = inputs("delta, channel", 40)
    every = lambda n: (jnp.arange(40) % n == 0)[None, :, None]
    args["k"] = jnp.broadcast_to(args["k"][:, :1], args["k"].shape)
    args["beta"] = jnp.where(every(3), 0.0, jnp.full((2, 40, 3), 2.0))
    args["log_decay"] = jnp.where(every(7)[..., None], -1e4 * args["log_decay"] ** 2, 0.0)
    fn = functools.partial(kernels.linear_recurrence, implementation=implementation)
    slow = functools.partial(oracle, segments=jnp.zeros((2, 40), int))
    actual, expected = jax.jit(lambda: (with_gradients(fn, args), with_gradients(slow, args)))()
    assert_close(actual, expected)


@pytest.mark.parametrize("gate", GATES)
def test_size_of_a_chunk_changes_nothing(gate):
    args = inputs(gate, 130)
    run = lambda chunk: kernels.linear_recurrence(**args, chunk=chunk)
    small, odd, large = jax.jit(lambda: [run(chunk) for chunk in (16, 48, 64)])()
    assert_close(small, large)
    assert_close(odd, large)


@pytest.mark.parametrize("gate", [gate for gate, kind in GATES.items() if "log_decay" in kind])
def test_a_large_decay_costs_no_digits_of_a_small_one(gate):
    """Over a long chunk: a difference of sums of all decays would have lost the small ones."""
    args = inputs(gate, 80, strength=1e4)
    fn = functools.partial(kernels.linear_recurrence, chunk=80)
    slow = functools.partial(oracle, segments=jnp.zeros((2, 80), int))
    actual, expected = jax.jit(lambda: (with_gradients(fn, args), with_gradients(slow, args)))()
    assert_close(actual, expected)


def test_one_decay_for_all_channels_is_the_decay_of_the_head():
    args = inputs("head", 40)
    decay = jnp.broadcast_to(args["log_decay"], args["k"].shape)
    run = lambda args: kernels.linear_recurrence(**args, chunk=32)
    both = jax.jit(lambda: (run(args), run(args | dict(log_decay=decay))))()
    chex.assert_trees_all_close(*both, rtol=1e-5, atol=1e-5)


def test_delta_rule_reads_back_what_it_stored_last():
    """With beta = 1 and keys of norm 1, asking for the newest key gives its value."""
    args = inputs("delta", 40)
    args |= dict(q=args["k"], beta=jnp.ones_like(args["beta"]))
    o, _ = jax.jit(lambda: kernels.linear_recurrence(**args))()
    chex.assert_trees_all_close(o, args["v"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_bfloat16_goes_in_and_out_with_a_float32_state(implementation):
    args = inputs("delta, channel", 20, jnp.bfloat16, V=1)
    raised = {k: x.astype(jnp.float32) for k, x in args.items()}
    run = functools.partial(kernels.linear_recurrence, implementation=implementation)
    o, state = jax.jit(lambda: run(**args))()
    exact, exact_state = jax.jit(lambda: run(**raised))()
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    chex.assert_trees_all_equal(o, exact.astype(jnp.bfloat16))
    chex.assert_trees_all_close(state, exact_state, rtol=1e-6)


def test_two_cores_do_not_race():
    """With memory that is NaN until it is written, and the pipeline's copies simulated."""
    args, starts = inputs("delta, head", 37), documents.starts(packed(37))
    state, beta = args["initial_state"], args["beta"][..., None]
    tokens = args["q"], args["k"], args["v"], args["log_decay"], beta

    def run(implementation, **options):
        o, last, states = implementation.forward(tokens, state, starts, chunk=16, **options)
        by = tokens, starts, states, 2 * o, 3 * last
        return o, last, implementation.backward(*by, chunk=16, **options)

    simulated = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)  # a race raises
    both = jax.jit(lambda: (run(mosaic_tpu, interpret=simulated), run(xla)))()
    assert_close(*both)


@pytest.mark.parametrize("gate", GATES)
def test_kernels_lower_for_tpu_by_default(gate, monkeypatch):
    monkeypatch.setattr(placing, "whole", lambda: True)
    args = jax.eval_shape(lambda: inputs(gate, 70, jnp.bfloat16))
    loss = lambda args: sum(
        x.astype(jnp.float32).sum() for x in kernels.linear_recurrence(**args, segments=packed(70))
    )
    export = lambda platform: jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform])
    assert export("tpu")(args).mlir_module().count("tpu_custom_call") == 2
    assert "custom_call" not in export("cpu")(args).mlir_module()


def test_heads_over_devices_equal_one_device():
    """Documents, the same for all heads, are whole on each device."""
    mesh, P = sharding.make_mesh(tensor=4), jax.P
    args, segments = inputs("delta, head", 20, N=4), packed(20)
    heads, head = P(None, None, "tensor"), P(None, "tensor")
    places = ({k: head if k == "initial_state" else heads for k in args}, P())
    fn = lambda args, segments: kernels.linear_recurrence(**args, segments=segments, chunk=16)
    split = jax.shard_map(fn, mesh=mesh, in_specs=places, out_specs=(heads, head))
    actual = jax.jit(lambda: with_gradients(lambda **args: split(args, segments), args))()
    expected = jax.jit(lambda: with_gradients(lambda **args: fn(args, segments), args))()
    assert_close(actual, expected)


def test_only_xla_has_a_forward_mode():
    args = inputs("delta, head", 9)
    slope = lambda implementation: jax.jvp(
        lambda args: kernels.linear_recurrence(**args, implementation=implementation)[0],
        (args,),
        (args,),
    )
    o, tangent = jax.jit(lambda: slope("xla"))()
    assert tangent.shape == o.shape and tangent.any()
    with pytest.raises(TypeError, match="forward-mode"):
        slope(None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(implementation="triton"), "implementation='triton' must be one of"),
        (dict(chunk=24), "chunk=24 must be a positive multiple of 16"),
        (dict(q=jnp.zeros((2, 8, 3, 8))), r"shapes don't fit: q \(2, 8, 3, 8\)"),
        (dict(log_decay=jnp.zeros((2, 9, 3, 2))), r"log_decay of shape \(2, 9, 3, 2\) must have"),
        (dict(beta=jnp.zeros((2, 9))), r"beta of shape \(2, 9\) must have shape \(2, 9, 3\)"),
        (dict(segments=jnp.zeros((2, 8), int)), r"segments of shape \(2, 8\) must .* \(2, 9\)"),
        (dict(initial_state=jnp.zeros((2, 3, 5, 8))), r"initial_state of .* \(2, 3, 8, 5\)"),
    ],
)
def test_wrong_arguments_raise(wrong, message):
    unchecked = inspect.unwrap(kernels.linear_recurrence)  # by the annotations, as outside of tests
    with pytest.raises(ValueError, match=message):
        unchecked(**inputs("none", 9) | wrong)
