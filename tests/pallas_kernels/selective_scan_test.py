"""Against the recurrence, token by token: outputs, final state, gradients; and what is held."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnjax.core import sharding
from pallas_kernels import placing
from pallas_kernels import selective_scan as kernels
from pallas_kernels.selective_scan import mosaic_tpu, xla
from tests import cost

KEY = jax.random.key(0)
N, H, M = 3, 4, 5


def inputs(T, dtype=jnp.float32, strength=1.0, N=N, H=H, M=M):
    keys = jax.random.split(KEY, 6)
    x, delta = jax.random.normal(keys[0], (2, 2, T, N, H))
    b, c = jax.random.normal(keys[1], (2, 2, T, N, M))
    args = dict(x=x, delta=strength * jax.nn.softplus(delta - 1), b=b, c=c)
    args["rate"] = -jnp.exp(jax.random.normal(keys[2], (N, H, M)))
    args["skip"] = jax.random.normal(keys[3], (N, H))
    state = jax.random.normal(keys[4], (2, N, H, M))
    return jax.tree.map(lambda a: a.astype(dtype), args) | dict(initial_state=state)


def packed(T):
    """Segments that begin within chunks of 16 and at their borders, one of a single token."""
    first = jnp.isin(jnp.arange(T), jnp.array([3, 4, 16, 21]))
    second = jnp.isin(jnp.arange(T), jnp.array([15, 32]))
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


def assert_equals_the_recurrence(args, segments=None, **options):
    fn = functools.partial(kernels.selective_scan, segments=segments, chunk=16, **options)
    starts = jnp.zeros(args["x"].shape[:2], int) if segments is None else segments
    slow = functools.partial(oracle, segments=starts)
    actual, expected = jax.jit(lambda: (with_gradients(fn, args), with_gradients(slow, args)))()
    assert_close(actual, expected)


def assert_close(actual, expected):
    """Within 1e-5 of a typical entry: a sum of many terms has the rounding of their size."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-5 * float(jnp.sqrt(jnp.mean(b**2))))


@pytest.mark.parametrize(
    ("T", "segmented", "implementation"),
    [
        (32, False, None),
        (37, True, None),
        (37, True, "xla"),
        (33, True, "interpret"),  # of the last chunk there is one token
    ],
)
def test_equals_the_recurrence(T, segmented, implementation):
    segments = packed(T) if segmented else None
    assert_equals_the_recurrence(inputs(T), segments, implementation=implementation)


def test_channels_in_several_parts():
    """Of which the last isn't full, with states so large that a step takes no more than 128."""
    args = inputs(19, N=1, H=130, M=136)
    assert mosaic_tpu.layout.Cut.of(130, 136, 19, 16).parts == 2
    args["delta"] = args["delta"].at[:, 7].set(1e4)  # and a step that forgets all before
    assert_equals_the_recurrence(args, implementation="interpret")


def test_size_of_a_chunk_changes_nothing():
    args = inputs(70)
    run = lambda chunk: kernels.selective_scan(**args, chunk=chunk)
    small, odd, large = jax.jit(lambda: [run(chunk) for chunk in (16, 48, 64)])()
    chex.assert_trees_all_close(small, large, rtol=1e-5, atol=1e-5)
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


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_bfloat16_goes_in_and_out_with_a_float32_state(implementation):
    args = inputs(20, jnp.bfloat16)
    raised = {k: a.astype(jnp.float32) for k, a in args.items()}
    run = functools.partial(kernels.selective_scan, implementation=implementation)
    (y, state), (exact, exact_state) = jax.jit(lambda: (run(**args), run(**raised)))()
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    chex.assert_trees_all_equal(y, exact.astype(jnp.bfloat16))
    chex.assert_trees_all_close(state, exact_state, rtol=1e-6)


def test_two_cores_do_not_race():
    """With memory that is NaN until it is written, and the pipeline's copies simulated."""
    args, new = inputs(19, N=1), jnp.diff(packed(19), axis=1, prepend=0) != 0
    state, weights = args.pop("initial_state"), (args.pop("rate"), args.pop("skip"))
    tokens = tuple(args[name] for name in ("x", "delta", "b", "c"))

    def run(implementation, **options):
        y, last, states = implementation.forward(tokens, weights, state, new, chunk=16, **options)
        by = tokens, weights, new, states, 2 * y, 3 * last
        return y, last, states, implementation.backward(*by, chunk=16, **options)

    simulated = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)  # a race raises
    both = jax.jit(lambda: (run(mosaic_tpu, interpret=simulated), run(xla)))()
    chex.assert_trees_all_close(*both, rtol=1e-5, atol=1e-5)


def test_kernels_lower_for_tpu_by_default(monkeypatch):
    monkeypatch.setattr(placing, "whole", lambda: True)
    args = jax.eval_shape(lambda: inputs(70, jnp.bfloat16))
    run = functools.partial(kernels.selective_scan, segments=packed(70))
    loss = lambda args: sum(a.astype(jnp.float32).sum() for a in run(**args))
    export = lambda platform: jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform])
    assert export("tpu")(args).mlir_module().count("tpu_custom_call") == 2
    assert "custom_call" not in export("cpu")(args).mlir_module()


def test_sequences_over_devices_add_up_gradients_of_weights():
    mesh, P = sharding.make_mesh(data=2, devices=jax.devices()[:2]), jax.P
    args = inputs(20)
    batch = {name: P("data") for name in args} | dict(rate=P(), skip=P())
    fn = lambda args: kernels.selective_scan(**args, chunk=16)
    split = jax.shard_map(fn, mesh=mesh, in_specs=(batch,), out_specs=P("data"))
    both = lambda fn: lambda: with_gradients(lambda **args: fn(args), args)
    actual, expected = jax.jit(both(split))(), jax.jit(both(fn))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_only_xla_has_a_forward_mode():
    args = inputs(9)
    slope = lambda implementation: jax.jvp(
        lambda args: kernels.selective_scan(**args, implementation=implementation)[0],
        (args,),
        (args,),
    )
    y, tangent = jax.jit(lambda: slope("xla"))()
    assert tangent.shape == y.shape and tangent.any()
    with pytest.raises(TypeError, match="forward-mode"):
        slope(None)


def test_states_too_large_for_the_kernel():
    args = jax.eval_shape(lambda: inputs(9, M=300))
    run = lambda implementation: jax.eval_shape(
        lambda args: kernels.selective_scan(**args, implementation=implementation), args
    )
    assert not mosaic_tpu.fits(300, 64) and mosaic_tpu.fits(300, 48)
    run(None)  # takes XLA's
    with pytest.raises(NotImplementedError, match="can't hold chunk=64 states of M=300 entries"):
        run("pallas")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(implementation="triton"), "implementation='triton' must be one of"),
        (dict(chunk=24), "chunk=24 must be a positive multiple of 16"),
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
