"""The kernels of linear_recurrence, compiled for every TPU; for H100 there is XLA's scan."""

import functools

import jax
import jax.numpy as jnp
import pytest

from compile_tests import calls
from experiments import targets
from pallas_kernels import linear_recurrence as kernels

LONG = 128 * 1024
GATES = ("none", "head", "channel", "delta", "delta, head", "delta, channel")


def shapes(gate, T, *, dtype="bfloat16", H=128, V=128, N=2, segmented=False, continued=False):
    token = lambda F, dtype: jax.ShapeDtypeStruct((1, T, N, F), dtype)
    args = dict(q=token(H, dtype), k=token(H, dtype), v=token(V, dtype))
    if "head" in gate or "channel" in gate:
        args["log_decay"] = token(1 if "head" in gate else H, "float32")
    if "delta" in gate:
        args["beta"] = jax.ShapeDtypeStruct((1, T, N), "float32")
    if segmented:
        args["segments"] = jax.ShapeDtypeStruct((1, T), "int32")
    if continued:
        args["initial_state"] = jax.ShapeDtypeStruct((1, N, H, V), "float32")
    return args


def backward(args, **options):
    """Gradients of all but integers, by cotangents of output and final state both."""
    inexact = {name: x for name, x in args.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    fn = lambda inexact: kernels.linear_recurrence(**args | inexact, **options)
    out, vjp = jax.vjp(fn, inexact)
    return vjp(jax.tree.map(jnp.ones_like, out))


def assert_both_kernels(compiled):
    found = calls.kernels(compiled)
    assert [x.name for x in found] == ["linear_recurrence", "linear_recurrence_backward"]
    assert all(0 < call.vmem < calls.VMEM for call in found)


@pytest.mark.parametrize("target", calls.TPUS)
@pytest.mark.parametrize("gate", GATES)
def test_forward(target, gate):
    fn = lambda args: kernels.linear_recurrence(**args)
    (call,) = calls.kernels(targets.compile_for(target, fn, shapes(gate, LONG)))
    assert call.name == "linear_recurrence"
    assert 0 < call.vmem < calls.VMEM


@pytest.mark.parametrize("target", calls.TPUS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("T", "dtype"), [(4096, "float32"), (LONG, "bfloat16")])
def test_backward(target, gate, T, dtype):
    assert_both_kernels(targets.compile_for(target, backward, shapes(gate, T, dtype=dtype)))


@pytest.mark.parametrize("gate", ["delta", "delta, head", "channel"])
@pytest.mark.parametrize(("H", "V", "T", "dtype"), [(64, 192, 4000, "bfloat16"), (24, 1, 1, "f4")])
def test_odd_sizes(gate, H, V, T, dtype):
    options = dict(H=H, V=V, dtype=dtype, segmented=True, continued=True)
    assert_both_kernels(targets.compile_for("v5e:2x2", backward, shapes(gate, T, **options)))


@pytest.mark.parametrize("target", calls.GPUS)
def test_without_a_kernel_of_its_own(target):
    args = shapes("delta, channel", 4096)
    assert not calls.kernels(targets.compile_for(target, backward, args))
    asked = functools.partial(backward, implementation="pallas")
    with pytest.raises(Exception, match="(?i)pallas|mosaic|lower"):
        targets.compile_for(target, asked, args)
