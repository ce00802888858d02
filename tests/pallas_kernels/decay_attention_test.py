"""Each implementation against the recurrence, token by token: outputs, final state, gradients."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import sharding
from pallas_kernels import decay_attention as kernels
from pallas_kernels import placing
from tests import cotangents


def inputs(T, H=8, V=5, dtype=jnp.float32):
    """With a head that doesn't decay, one that does, and one that forgets at once."""
    draw = np.random.default_rng(0).standard_normal  # JAX would compile each of these operations
    q, k, v = draw((2, T, 3, H)), draw((2, T, 3, H)), draw((2, T, 3, V))
    args = {name: jnp.asarray(x, dtype) for name, x in dict(q=q, k=k, v=v).items()}
    log_decay = jnp.asarray([0, -0.1, -50], "float32")
    state = jnp.asarray(draw((2, 3, H, V)), "float32")
    return args | dict(log_decay=log_decay, initial_state=state)


def packed(T):
    """Segments that begin within chunks of 16 and at their borders, one of a single token."""
    first, second = (np.isin(np.arange(T), starts) for starts in ([3, 4, 16, 21], [30, 32]))
    return jnp.asarray(np.cumsum(np.stack([first, second]), 1), jnp.int32)


def oracle(q, k, v, log_decay, initial_state, segments):
    decay = jnp.exp(jax.lax.stop_gradient(log_decay))[None, :, None, None]

    def step(state, x):
        q, k, v, same = x
        state = jnp.where(same[:, None, None, None], decay * state, 0)
        state = state + jnp.einsum("BNH,BNV->BNHV", k, v)
        return state, jnp.einsum("BNH,BNHV->BNV", q, state)

    same = jnp.diff(segments, axis=1, prepend=segments[:, :1]) == 0
    xs = [x.swapaxes(0, 1) for x in (q, k, v, same)]
    state, o = jax.lax.scan(step, initial_state, xs)
    return o.swapaxes(0, 1), state


def with_gradients(fn, args):
    """Outputs, and gradients by random cotangents of both the output and the final state."""
    out, vjp = jax.vjp(lambda args: fn(**args), args)
    return out, vjp(cotangents.like(out))


@pytest.mark.parametrize(("T", "segmented"), [(1, True), (48, False), (37, True)])
def test_equals_the_recurrence(T, segmented):
    segments = packed(T) if segmented else None
    fns = [
        functools.partial(kernels.decay_attention, segments=segments, chunk=16, implementation=x)
        for x in ("xla", "interpret")
    ]
    fns.append(functools.partial(oracle, segments=packed(T) * segmented))
    *actual, expected = jax.jit(lambda args: [with_gradients(fn, args) for fn in fns])(inputs(T))
    for each in actual:
        chex.assert_trees_all_close(each, expected, rtol=1e-5, atol=1e-5)


def test_packed_documents_do_reset_the_state():
    args = inputs(37)
    run = jax.jit(lambda segments: kernels.decay_attention(**args, segments=segments))
    o, state = run(packed(37))
    whole, last = run(jnp.zeros((2, 37), jnp.int32))
    o, state, whole, last = (np.asarray(x) for x in (o, state, whole, last))
    np.testing.assert_array_equal(o[0, :3], whole[0, :3])
    assert (abs(o[0, 3:, 0] - whole[0, 3:, 0]).max(-1) > 1e-3).all()
    assert (abs(state - last)[:, 0] > 1e-3).all()


def test_size_of_a_chunk_changes_nothing():
    args = inputs(200)
    run = lambda chunk: kernels.decay_attention(**args, chunk=chunk)
    small, large, huge = jax.jit(lambda: [run(chunk) for chunk in (16, 128, 1024)])()
    chex.assert_trees_all_close(small, large, rtol=1e-5, atol=1e-4)
    chex.assert_trees_all_close(huge, large, rtol=1e-5, atol=1e-4)


def test_no_decay_overflows_over_a_long_chunk():
    args = inputs(300) | dict(log_decay=jnp.array([0, -1, -1e4]))
    fn = functools.partial(kernels.decay_attention, chunk=304)
    for leaf in jax.tree.leaves(jax.jit(lambda args: with_gradients(fn, args))(args)):
        assert np.isfinite(leaf).all()


def test_decay_is_a_constant():
    loss = lambda log_decay: kernels.decay_attention(**inputs(9) | dict(log_decay=log_decay))[0]
    grad = jax.jit(jax.grad(lambda log_decay: loss(log_decay).sum()))(inputs(9)["log_decay"])
    assert not np.any(grad)


def test_bfloat16_goes_in_and_out_with_a_float32_state():
    args = inputs(20, dtype=jnp.bfloat16) | dict(initial_state=None)
    raised = {k: x if x is None else x.astype(jnp.float32) for k, x in args.items()}
    run = lambda *all_args: [kernels.decay_attention(**x) for x in all_args]
    (o, state), (exact, exact_state) = jax.jit(run)(args, raised)
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    chex.assert_trees_all_equal(o, exact.astype(jnp.bfloat16))
    chex.assert_trees_all_close(state, exact_state, rtol=1e-6)


@pytest.mark.parametrize(
    ("T", "V", "dtype", "segmented"),
    [(1, 8, "float32", False), (300, 128, "bfloat16", False), (70, 65, "float32", True)],
)
def test_kernel_lowers_for_tpu_by_default(T, V, dtype, segmented, monkeypatch):
    monkeypatch.setattr(placing, "whole", lambda: True)
    shapes = jax.eval_shape(lambda: inputs(T, H=8, V=V, dtype=dtype))
    segments = jnp.zeros((2, T), int) if segmented else None
    fn = functools.partial(kernels.decay_attention, segments=segments)
    loss = lambda args: sum(x.astype(jnp.float32).sum() for x in fn(**args))
    export = lambda platform: jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform])
    assert export("tpu")(shapes).mlir_module().count("tpu_custom_call") == 3
    if segmented:
        assert "custom_call" not in export("cpu")(shapes).mlir_module()


def test_heads_over_devices_equal_one_device():
    mesh, P = sharding.make_mesh(tensor=4), jax.P
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 20, 4, 8), "f4")
    args = dict(q=q, k=k, v=v, log_decay=-jnp.arange(4.0))
    heads = P(None, None, "tensor")
    places = (dict(q=heads, k=heads, v=heads, log_decay=P("tensor")),)
    fn = lambda args: kernels.decay_attention(**args, chunk=16)
    split = jax.shard_map(fn, mesh=mesh, in_specs=places, out_specs=(heads, P(None, "tensor")))
    actual = jax.jit(lambda: with_gradients(lambda **args: split(args), args))()
    expected = jax.jit(lambda: with_gradients(lambda **args: fn(args), args))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(implementation="triton"), "implementation='triton' must be one of"),
        (dict(chunk=24), "chunk=24 must be a positive multiple of 16"),
        (dict(log_decay=np.zeros(2)), r"shapes don't fit: .* log_decay \(2,\)"),
        (dict(q=np.zeros((2, 8, 3, 8))), r"shapes don't fit: q \(2, 8, 3, 8\)"),
        (dict(segments=np.zeros((2, 8), int)), r"segments of shape \(2, 8\) must .* \(2, 9\)"),
        (dict(initial_state=np.zeros((2, 3, 5, 8))), r"a state of shape .* \(2, 3, 8, 5\)"),
    ],
)
def test_wrong_arguments_raise(wrong, message):
    unchecked = inspect.unwrap(kernels.decay_attention)  # by the annotations, as outside of tests
    with pytest.raises(ValueError, match=message):
        unchecked(**inputs(9) | wrong)
