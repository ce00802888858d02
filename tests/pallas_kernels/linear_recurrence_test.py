"""Every gate against the recurrence, token by token: outputs, final state, gradients."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnjax.core import sharding
from pallas_kernels import linear_recurrence as kernels
from pallas_kernels import placing
from pallas_kernels import segments as documents
from pallas_kernels.linear_recurrence import mosaic_tpu, xla
from tests import cotangents

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
    draw = np.random.default_rng(0)  # JAX would compile each of these operations
    q, k = draw.normal(size=(2, 2, T, N, 8))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    args = dict(q=q, k=k, v=draw.normal(size=(2, T, N, V)))
    if "log_decay" in GATES[gate]:
        args["log_decay"] = -strength * draw.uniform(size=(2, T, N, GATES[gate]["log_decay"])) ** 4
    if "beta" in GATES[gate]:
        args["beta"] = draw.uniform(high=2.0, size=(2, T, N))
    args = {name: jnp.asarray(x, dtype) for name, x in args.items()}
    return args | dict(initial_state=jnp.asarray(draw.normal(size=(2, N, 8, V)), jnp.float32))


def packed(T):
    """Segments that begin within chunks of 16 and at their borders, one of a single token."""
    first, second = (np.isin(np.arange(T), starts) for starts in ([3, 4, 16, 21, 64], [30, 32]))
    return jnp.asarray(np.cumsum(np.stack([first, second]), 1), jnp.int32)


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
    return out, vjp(cotangents.like(out))


def assert_close(actual, expected):
    """Within 1e-5 of a typical entry: a sum of many terms has the rounding of their size."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-5 * float(np.sqrt(np.mean(b**2))))


def assert_equal_the_recurrence(args, segments, *forms):
    """Each form, which is options of `linear_recurrence`; the recurrence in the same program."""
    starts = np.zeros(args["q"].shape[:2], int) if segments is None else segments
    fns = [functools.partial(kernels.linear_recurrence, segments=segments, **x) for x in forms]
    fns.append(functools.partial(oracle, segments=starts))
    *actual, expected = jax.jit(lambda args: [with_gradients(fn, args) for fn in fns])(args)
    for each in actual:
        assert_close(each, expected)


# The kernel, of the same maths as XLA's form, has here those gates that the tests below do not give
# it: with both, decays by head and by channel. JAX's own derivatives of XLA's form need two.
BY_DEFAULT = dict(chunk=32, implementation=None)
BY_KERNEL = dict(chunk=16, implementation="interpret")
BY_JAX = dict(chunk=32, implementation="xla")
FORMS = {
    "none": [BY_DEFAULT, BY_KERNEL, BY_JAX],
    "head": [BY_DEFAULT],
    "channel": [BY_DEFAULT, BY_KERNEL],
    "delta, head": [BY_DEFAULT, BY_JAX],
    "delta, channel": [BY_DEFAULT],
}


@pytest.mark.parametrize("gate", FORMS)
def test_equals_the_recurrence(gate):
    assert_equal_the_recurrence(inputs(gate, 69), packed(69), *FORMS[gate])


@pytest.mark.parametrize("gate", ["channel", "delta, head"])
def test_one_token(gate):
    assert_equal_the_recurrence(inputs(gate, 1), packed(1), dict(implementation="interpret"))


def test_gates_at_their_ends():
    """beta of 0 and 2, no decay and one that forgets at once, keys that stay the same."""
    args, at = inputs("delta, channel", 50), np.arange(50)[None, :, None]
    args["k"] = np.broadcast_to(args["k"][:, :1], args["k"].shape)
    args["beta"] = np.where(at % 3 == 0, 0, np.full((2, 50, 3), 2, np.float32))
    forgets = -1e4 * np.asarray(args["log_decay"]) ** 2
    args["log_decay"] = np.where(at[..., None] % 7 == 0, forgets, np.float32(0))
    assert_equal_the_recurrence(args, None, dict(chunk=48, implementation="interpret"))


@pytest.mark.parametrize("gate", ["channel", "delta, head"])
def test_a_large_decay_costs_no_digits_of_a_small_one(gate):
    """Over a long chunk: a difference of sums of all decays would have lost the small ones."""
    assert_equal_the_recurrence(inputs(gate, 90, strength=1e4), None, dict(chunk=80))


def test_delta_rule_reads_back_what_it_stored_last():
    """With beta = 1 and keys of norm 1, asking for the newest key gives its value."""
    args = inputs("delta", 40)
    args |= dict(q=args["k"], beta=jnp.ones_like(args["beta"]))
    o, _ = jax.jit(lambda: kernels.linear_recurrence(**args))()
    chex.assert_trees_all_close(o, args["v"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_bfloat16_goes_in_and_out_with_a_float32_state(implementation):
    args = inputs("delta, head", 20, jnp.bfloat16, V=1)
    raised = {k: x.astype(jnp.float32) for k, x in args.items()}
    options = dict(chunk=16, implementation=implementation)
    run = lambda *all_args: [kernels.linear_recurrence(**x, **options) for x in all_args]
    (o, state), (exact, exact_state) = jax.jit(run)(args, raised)
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


@pytest.mark.parametrize("gate", ["none", "head", "delta", "delta, channel"])
def test_kernels_lower_for_tpu_by_default(gate, monkeypatch):
    monkeypatch.setattr(placing, "whole", lambda: True)
    args = jax.eval_shape(lambda: inputs(gate, 70, jnp.bfloat16))
    loss = lambda args: sum(
        x.astype(jnp.float32).sum() for x in kernels.linear_recurrence(**args, segments=packed(70))
    )
    export = lambda platform: jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform])
    assert export("tpu")(args).mlir_module().count("tpu_custom_call") == 2
    if gate == "none":
        assert "custom_call" not in export("cpu")(args).mlir_module()


def test_heads_over_devices_equal_the_recurrence():
    """Documents, the same for all heads, are whole on each device."""
    mesh, P = sharding.make_mesh(tensor=4), jax.P
    args, segments = inputs("delta, head", 20, N=4), packed(20)
    heads, head = P(None, None, "tensor"), P(None, "tensor")
    places = ({k: head if k == "initial_state" else heads for k in args}, P())
    fn = lambda args, segments: kernels.linear_recurrence(**args, segments=segments, chunk=16)
    split = jax.shard_map(fn, mesh=mesh, in_specs=places, out_specs=(heads, head))
    actual = jax.jit(lambda: with_gradients(lambda **args: split(args, segments), args))()
    slow = functools.partial(oracle, segments=segments)
    assert_close(actual, jax.jit(lambda: with_gradients(slow, args))())


def test_only_xla_has_a_forward_mode():
    args = inputs("channel", 9)
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
        (dict(q=np.zeros((2, 8, 3, 8))), r"shapes don't fit: q \(2, 8, 3, 8\)"),
        (dict(log_decay=np.zeros((2, 9, 3, 2))), r"log_decay of shape \(2, 9, 3, 2\) must have"),
        (dict(beta=np.zeros((2, 9))), r"beta of shape \(2, 9\) must have shape \(2, 9, 3\)"),
        (dict(segments=np.zeros((2, 8), int)), r"segments of shape \(2, 8\) must .* \(2, 9\)"),
        (dict(initial_state=np.zeros((2, 3, 5, 8))), r"initial_state of .* \(2, 3, 8, 5\)"),
    ],
)
def test_wrong_arguments_raise(wrong, message):
    unchecked = inspect.unwrap(kernels.linear_recurrence)  # by the annotations, as outside of tests
    with pytest.raises(ValueError, match=message):
        unchecked(**inputs("none", 9) | wrong)
