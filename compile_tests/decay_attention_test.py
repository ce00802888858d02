"""The kernel of decay_attention, compiled for every TPU, and what H100 has instead."""

import functools

import jax
import jax.numpy as jnp
import pytest

from compile_tests import calls
from experiments import targets
from pallas_kernels import decay_attention as kernels

LONG = 128 * 1024


def shapes(T, *, dtype, H=128, V=128, N=2, segmented=False, continued=False):
    token = lambda F: jax.ShapeDtypeStruct((1, T, N, F), dtype)
    args = dict(q=token(H), k=token(H), v=token(V), log_decay=jax.ShapeDtypeStruct((N,), "float32"))
    if segmented:
        args["segments"] = jax.ShapeDtypeStruct((1, T), "int32")
    if continued:
        args["initial_state"] = jax.ShapeDtypeStruct((1, N, H, V), "float32")
    return args


def backward(args, **options):
    """Gradients of all but integers, by cotangents of output and final state both."""
    inexact = {name: x for name, x in args.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    fn = lambda inexact: kernels.decay_attention(**args | inexact, **options)
    out, vjp = jax.vjp(fn, inexact)
    return vjp(jax.tree.map(jnp.ones_like, out))


@pytest.mark.parametrize("target", calls.TPUS)
@pytest.mark.parametrize("T", [4096, LONG])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward(target, T, dtype):
    fn = lambda args: kernels.decay_attention(**args)
    (call,) = calls.kernels(targets.compile_for(target, fn, shapes(T, dtype=dtype)))
    assert call.name == "decay_attention"
    assert 0 < call.vmem < calls.VMEM


@pytest.mark.parametrize("target", calls.TPUS)
@pytest.mark.parametrize("T", [4096, LONG])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backward_is_three_calls(target, T, dtype):
    found = calls.kernels(targets.compile_for(target, backward, shapes(T, dtype=dtype)))
    assert [call.name for call in found] == ["decay_attention"] * 3
    assert all(0 < call.vmem < calls.VMEM for call in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("H", "V", "T", "segmented", "continued"),
    [(64, 192, 4096, True, True), (24, 40, 4000, True, False), (128, 256, 1, False, True)],
)
def test_odd_sizes(dtype, H, V, T, segmented, continued):
    options = dict(dtype=dtype, H=H, V=V, segmented=segmented, continued=continued)
    compiled = targets.compile_for("v5e:2x2", backward, shapes(T, **options))
    assert len(calls.kernels(compiled)) == 3


@pytest.mark.parametrize("target", calls.GPUS)
def test_on_a_gpu_the_kernel_of_linear_recurrence_if_asked_for(target):
    args = shapes(4096, dtype="bfloat16")
    assert not calls.kernels(targets.compile_for(target, backward, args))
    asked = functools.partial(backward, implementation="pallas")
    found = calls.kernels(targets.compile_for(target, asked, args))
    assert [call.name for call in found] == ["linear_recurrence"] * 3
