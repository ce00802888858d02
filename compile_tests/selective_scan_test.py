"""The kernels of selective_scan, compiled for every TPU and, where they are asked for, H100."""

import functools

import jax
import jax.numpy as jnp
import pytest

from compile_tests import calls
from experiments import targets
from pallas_kernels import selective_scan as kernels

LONG = 128 * 1024
NAMES = ["selective_scan", "selective_scan_backward"]


def shapes(T, *, dtype="bfloat16", N=1, H=1536, M=16, packed=False):
    token = lambda F, dtype: jax.ShapeDtypeStruct((1, T, N, F), dtype)
    weight = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
    args = dict(x=token(H, dtype), delta=token(H, "float32"))
    args |= dict(rate=weight(N, H, M), b=token(M, "float32"), c=token(M, "float32"))
    args |= dict(skip=weight(N, H))
    if packed:
        args["segments"] = jax.ShapeDtypeStruct((1, T), "int32")
        args["initial_state"] = weight(1, N, H, M)
    return args


def backward(args, **options):
    """Gradients of all but integers, by cotangents of output and final state both."""
    inexact = {name: x for name, x in args.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    fn = lambda inexact: kernels.selective_scan(**args | inexact, **options)
    out, vjp = jax.vjp(fn, inexact)
    return vjp(jax.tree.map(jnp.ones_like, out))


def assert_both_kernels(compiled):
    found = calls.kernels(compiled)
    assert [x.name for x in found] == NAMES
    assert all(0 < call.vmem < calls.VMEM for call in found)


@pytest.mark.parametrize("target", calls.TPUS)
def test_forward(target):
    fn = lambda args: kernels.selective_scan(**args)
    (call,) = calls.kernels(targets.compile_for(target, fn, shapes(LONG)))
    assert call.name == "selective_scan"
    assert 0 < call.vmem < calls.VMEM


@pytest.mark.parametrize("target", calls.TPUS)
@pytest.mark.parametrize(("T", "dtype"), [(4096, "float32"), (LONG, "bfloat16")])
def test_backward(target, T, dtype):
    compiled = targets.compile_for(target, backward, shapes(T, dtype=dtype))
    assert_both_kernels(compiled)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 3 * memory.argument_size_in_bytes  # no T H M anywhere


@pytest.mark.parametrize(
    ("N", "H", "M", "T", "dtype"),
    [(2, 128, 64, 4000, "bfloat16"), (2, 24, 1, 1, "float32"), (1, 600, 256, 100, "bfloat16")],
)
def test_odd_sizes_and_documents(N, H, M, T, dtype):
    args = shapes(T, dtype=dtype, N=N, H=H, M=M, packed=True)
    assert_both_kernels(targets.compile_for("v5e:2x2", backward, args))


@pytest.mark.parametrize("target", calls.GPUS)
def test_without_a_kernel_by_default(target):
    args, fn = shapes(4096), functools.partial(kernels.selective_scan, chunk=16)
    assert not calls.kernels(targets.compile_for(target, lambda args: fn(**args), args))


@pytest.mark.parametrize(
    "args",
    [shapes(LONG), shapes(4000, dtype="float32", N=2, H=100, M=40, packed=True)],
    ids=["long", "odd sizes and documents"],
)
def test_on_gpu(args):
    """The forward kernel goes twice: again for the states before each step, without an output."""
    run = functools.partial(backward, implementation="pallas")
    compiled = targets.compile_for("h100:1", run, args)
    assert [x.name for x in calls.kernels(compiled)] == [NAMES[0], *NAMES]
    states = 4 * args["x"].size * args["rate"].shape[-1]  # of all tokens
    assert compiled.memory_analysis().temp_size_in_bytes < states / 2
