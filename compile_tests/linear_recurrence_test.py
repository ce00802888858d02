"""The kernels of linear_recurrence, compiled for every TPU and, where they are asked for, H100."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compile_tests import calls
from experiments import targets
from pallas_kernels import linear_recurrence as kernels
from pallas_kernels.linear_recurrence import mosaic_gpu
from pallas_kernels.linear_recurrence.mosaic_gpu import chain
from pallas_kernels.linear_recurrence.mosaic_gpu.pieces import Pieces

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
def test_without_a_kernel_by_default(target):
    assert not calls.kernels(targets.compile_for(target, backward, shapes("none", 4096)))


def test_forward_on_h100():
    fn = lambda args: kernels.linear_recurrence(**args, implementation="pallas")
    (call,) = calls.kernels(targets.compile_for("h100:1", fn, shapes("channel", LONG)))
    assert call.name == "linear_recurrence"


by_kernel = functools.partial(backward, implementation="pallas")


def test_backward_on_h100():
    args = shapes("head", LONG, N=4)
    compiled = targets.compile_for("h100:1", by_kernel, args)
    found = sorted(x.name for x in calls.kernels(compiled))
    assert found == ["linear_recurrence", "linear_recurrence_backward"]
    tokens = args["v"].size * 4  # bytes of an array of all tokens in float32
    assert compiled.memory_analysis().temp_size_in_bytes < 12 * tokens  # no T T anywhere


@pytest.mark.parametrize("dtype", mosaic_gpu.WIDEST)
def test_the_most_shared_memory_on_h100(dtype):
    """With the delta rule and the widest keys; Mosaic itself refuses what doesn't fit."""
    C, H, V = mosaic_gpu.CHUNK, mosaic_gpu.WIDEST[dtype], 128
    array = lambda *shape: jax.ShapeDtypeStruct((8, *shape), dtype)
    across, along = array(C, H), array(H, C)
    others = dict(v=array(V, C), weights=array(C, C), kept=array(H).update(dtype="float32"))
    state = jax.ShapeDtypeStruct((2, V, H), "float32")

    def both(x, y, state):
        out = chain.forward(x, state, keep=True, interpret=False)
        return out, chain.backward(y, state, interpret=False)

    x = Pieces(q=across, k=along, read=across, **others)
    y = Pieces(q=along, k=across, read=along, **others)
    assert len(calls.kernels(targets.compile_for("h100:1", both, x, y, state))) == 2


def test_h100_within_a_mesh():
    mesh = jax.sharding.Mesh(np.array(targets.devices("h100:2")), ("x",))
    heads = jax.P(None, None, "x")
    fn = jax.shard_map(by_kernel, mesh=mesh, in_specs=heads, out_specs=heads)
    place = jax.sharding.NamedSharding(mesh, heads)
    args = jax.tree.map(lambda x: x.update(sharding=place), shapes("none", 4096))
    assert len(calls.kernels(targets.compile_for("h100:2", fn, args))) == 2
