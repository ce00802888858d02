"""Against the recurrence, token by token: outputs, final state, gradients; and what is held."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnjax.core import sharding
from pallas_kernels import placing
from pallas_kernels import selective_scan as kernels
from pallas_kernels.selective_scan import mosaic_tpu, xla
from tests import cost, cotangents

N, H, M = 3, 4, 5


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Of the kernel's tokens, which it unrolls: several of them in the smallest chunk."""
    monkeypatch.setattr(mosaic_tpu, "_GROUP", 4)
    monkeypatch.setattr(mosaic_tpu.layout, "GROUP", 4)


def inputs(T, dtype=jnp.float32, strength=1.0, N=N, H=H, M=M):
    draw = np.random.default_rng(0).standard_normal  # JAX would compile each of these operations
    x, delta = draw((2, 2, T, N, H))
    b, c = draw((2, 2, T, N, M))
    args = dict(x=x, delta=strength * np.log1p(np.exp(delta - 1)), b=b, c=c)
    args |= dict(rate=-np.exp(draw((N, H, M))), skip=draw((N, H)))
    args = {name: jnp.asarray(a, dtype) for name, a in args.items()}
    return args | dict(initial_state=jnp.asarray(draw((2, N, H, M)), "float32"))


def packed(T):
    """Segments that begin within chunks of 16 and at their borders, one of a single token."""
    first, second = (np.isin(np.arange(T), starts) for starts in ([3, 4, 16, 21], [15, 32]))
    return jnp.asarray(np.cumsum(np.stack([first, second]), 1), jnp.int32)


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
    return out, vjp(cotangents.like(out))


def test_tokens_at_once_equal_tokens_in_turn():
    draw = np.random.default_rng(0)
    decay, added = draw.random((2, 2, 13, N, H, M), "f4")
    state = draw.standard_normal((2, N, H, M), "f4")
    both = (jax.jit(form)(decay, added, state) for form in (xla.at_once, xla.in_turn))
    chex.assert_trees_all_close(*both, rtol=1e-5, atol=1e-6)


def both(segments, *forms):
    """A program of each form, which is options of `selective_scan`, and of the recurrence."""
    fns = [functools.partial(kernels.selective_scan, segments=segments, **x) for x in forms]

    @jax.jit
    def run(args):
        starts = jnp.zeros(args["x"].shape[:2], int) if segments is None else segments
        slow = functools.partial(oracle, segments=starts)
        return [with_gradients(fn, args) for fn in (*fns, slow)]

    return run


def assert_close(actual, expected):
    """Within 1e-5 of a typical entry: a sum of many terms has the rounding of their size."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-5 * float(np.sqrt(np.mean(b**2))))


@pytest.fixture(scope="module")
def every_form():
    """With chunks that are half as long, twice, and of 33 tokens one alone in the last."""
    forms = dict(chunk=16, implementation="interpret"), dict(chunk=16, implementation="xla")
    return both(packed(33), *forms, dict(chunk=32))


def test_equals_the_recurrence(every_form):
    *actual, expected = every_form(inputs(33))
    for each in actual:
        assert_close(each, expected)


def test_no_step_overflows(every_form):
    for leaf in jax.tree.leaves(every_form(inputs(33, strength=1e4))):
        assert np.isfinite(leaf).all()


def test_channels_in_several_parts():
    """Of which the last isn't full, with states so large that a step takes no more than 128."""
    args = inputs(19, N=1, H=130, M=136)
    assert mosaic_tpu.layout.Cut.of(130, 136, 19, 16).parts == 2
    args["delta"] = args["delta"].at[:, 7].set(1e4)  # and a step that forgets all before
    *actual, expected = both(None, dict(chunk=16, implementation="interpret"), dict(chunk=16))(args)
    for each in actual:
        assert_close(each, expected)


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


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_bfloat16_goes_in_and_out_with_a_float32_state(implementation, monkeypatch):
    monkeypatch.undo()  # groups as large as on a TPU
    args = inputs(20, jnp.bfloat16)
    raised = {k: a.astype(jnp.float32) for k, a in args.items()}
    run = functools.partial(kernels.selective_scan, implementation=implementation)
    both = jax.jit(lambda args, raised: (run(**args), run(**raised)))
    (y, state), (exact, exact_state) = both(args, raised)
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
    monkeypatch.undo()
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
        run("interpret")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(implementation="triton"), "implementation='triton' must be one of"),
        (dict(chunk=24), "chunk=24 must be a positive multiple of 16"),
        (dict(x=jnp.zeros((2, 0, N, H))), "must have at least one token"),
        (
            dict(delta=np.zeros((2, 8, N, H))),
            r"delta of shape \(2, 8, 3, 4\) must .* \(2, 9, 3, 4\)",
        ),
        (dict(rate=np.zeros((N, M, H))), r"rate of shape \(3, 5, 4\) must have shape \(3, 4, 5\)"),
        (dict(c=np.zeros((2, 9, N, 6))), r"c of shape \(2, 9, 3, 6\) must have .* \(2, 9, 3, 5\)"),
        (dict(segments=np.zeros((2, 8), int)), r"segments of shape \(2, 8\) must .* \(2, 9\)"),
        (dict(initial_state=np.zeros((2, N, M, H))), r"initial_state of .* \(2, 3, 4, 5\)"),
    ],
)
def test_wrong_arguments_raise(wrong, message):
    unchecked = inspect.unwrap(kernels.selective_scan)  # by the annotations, as outside of tests
    with pytest.raises(ValueError, match=message):
        unchecked(**inputs(9) | wrong)
