"""The kernels of neighborhood, compiled for every TPU and for H100."""

import functools

import jax
import jax.numpy as jnp
import pytest

from attnjax.window import gna, swin
from compile_tests import calls
from experiments import targets

NAMES = ["neighborhood_attention", "neighborhood_attention_backward"]
ON_GPU = ["flash_attention", "flash_attention_dkv", "flash_attention_dq"]


def arrays(*grid, B=2, N=4, K=4, H=32, dtype="bfloat16", window=None):
    token = lambda heads: jax.ShapeDtypeStruct((B, *grid, heads, H), dtype)
    args = dict(q=token(N), k=token(K), v=token(K))
    if window is not None:
        args["bias"] = jax.ShapeDtypeStruct((1, N, window**2, window**2), "float32")
    return args


def backward(fn, args):
    o, vjp = jax.vjp(lambda args: fn(**args), args)
    return o, vjp(jnp.ones_like(o))  # without o forward would have nothing to do


def assert_both_kernels(target, fn, args):
    compiled = targets.compile_for(target, functools.partial(backward, fn), args)
    found = calls.kernels(compiled)
    assert sorted(x.name for x in found) == NAMES
    assert all(call.vmem < calls.VMEM for call in found)


@pytest.mark.parametrize(
    ("target", "grid", "options", "dtype"),
    [
        ("v5e:2x2", (56, 56), dict(window=7), "bfloat16"),
        ("v5p:2x2x1", (4096,), dict(window=16, stride=16, causal=True), "float32"),
        ("v6e:2x2", (64, 64, 64), dict(window=4, stride=2, dilation=2), "bfloat16"),
    ],
)
def test_neighborhoods(target, grid, options, dtype):
    fn = functools.partial(gna.gna, **options)
    assert_both_kernels(target, fn, arrays(*grid, B=1, dtype=dtype))


@pytest.mark.parametrize(
    ("target", "N", "shift", "dtype"),
    [
        ("v5e:2x2", 3, 3, "bfloat16"),
        ("v5p:2x2x1", 24, 0, "bfloat16"),
        ("v6e:2x2", 12, 3, "float32"),
    ],
)
def test_windows(target, N, shift, dtype):
    fn = functools.partial(swin.swin, window=7, shift=shift)
    assert_both_kernels(target, fn, arrays(56, 56, N=N, K=N, dtype=dtype, window=7))


@pytest.mark.parametrize("H", [20, 128])
def test_odd_sizes(H):
    fn = functools.partial(gna.gna, window=5, stride=3)
    assert_both_kernels("v5e:2x2", fn, arrays(13, 11, N=4, K=2, H=H))


def test_h100():
    options = dict(window=256, stride=64, dilation=2, causal=True, implementation="pallas")
    fn = functools.partial(gna.gna, **options)
    args = arrays(128 * 1024, B=1, K=2, H=64)
    compiled = targets.compile_for("h100:1", functools.partial(backward, fn), args)
    assert sorted(x.name for x in calls.kernels(compiled)) == ON_GPU
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 5 * memory.argument_size_in_bytes  # no T T anywhere


def test_h100_windows():
    fn = functools.partial(swin.swin, window=8, shift=4, implementation="pallas")
    args = arrays(64, 64, window=8)
    compiled = targets.compile_for("h100:1", functools.partial(backward, fn), args)
    wanted = sorted([*ON_GPU, "flash_attention_dbias"])
    assert sorted(x.name for x in calls.kernels(compiled)) == wanted
