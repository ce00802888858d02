"""The kernels of decode_attention, compiled for every TPU and, where they are asked for, H100."""

import jax
import numpy as np
import pytest

from compile_tests import calls
from experiments import targets
from pallas_kernels import decode_attention as kernels
from pallas_kernels import tables

K, H, PAGE = 8, 128, 128
LONG = 128 * 1024


def compile_on(target, *, B=64, S=32 * 1024, N=32, K=K, H=H, V=H, T=1, C=PAGE, dtype="bfloat16",
               **options):  # fmt: skip
    """(calls of kernels, executable); V None is a latent cache."""
    x = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    pools = [x(dtype, B * S // C, K, C, size) for size in (H, V) if size]
    integers = x("int32", B, S // C), x("int32", B)
    sinks = x("float32", N)

    def run(q, k, v, table, lengths, sinks):
        more = dict(scale=H**-0.5, sinks=sinks, **options)
        return kernels.decode_attention(q, k, v, table, lengths, **more)

    mesh = jax.sharding.Mesh(np.array(targets.devices(target)[:1]), ("x",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        args = x(dtype, B, T, N, H), *(pools if V else [*pools, None]), *integers, sinks
        compiled = targets.compile_for(target, run, *args)
    return calls.kernels(compiled), compiled


def assert_kernel(found):
    [call] = found
    assert call.name == "decode_attention" and 0 < call.vmem < calls.VMEM


def assert_kernel_on_gpu(**options):
    [call], compiled = compile_on("h100:1", implementation="pallas", **options)
    assert call.name == "decode_attention"
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 10  # no copy of the cache


# one key head, so that the cache is no larger than a v5e has memory for
@pytest.mark.parametrize("target", calls.TPUS)
@pytest.mark.parametrize("S", [32 * 1024, 128 * 1024])
def test_a_batch(target, S):
    found, compiled = compile_on(target, S=S, K=1, N=8)
    assert_kernel(found)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 100  # no copy of the cache


def test_keys_of_a_step_by_a_table():
    def vmem(keys):
        source = {"how": "computed", "rule": ""}
        row = dict(operation="decode_attention", implementation="pallas", source=source)
        row = tables.Row(**row, tiles={"keys": keys})
        with tables.using(tables.Table("x", "tpu", (row,))):
            found, _ = compile_on("v5e:2x2", K=1, N=8)
        assert_kernel(found)
        return found[0].vmem

    assert vmem(256) < vmem(2048) / 4


@pytest.mark.parametrize("target", calls.TPUS)
def test_a_long_sequence_and_many_heads(target):
    assert_kernel(compile_on(target, B=1, S=128 * 1024)[0])
    assert_kernel(compile_on(target, B=4, S=4096, N=32, K=32)[0])


@pytest.mark.parametrize("target", calls.TPUS)
def test_latent(target):
    """576 numbers a token for 128 heads."""
    options = dict(N=128, K=1, H=576, V=None, value_dim=512)
    assert_kernel(compile_on(target, B=8, **options)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("C", "T", "H", "V"), [(16, 1, 64, 64), (24, 3, 80, 40), (5, 2, 128, 128)])
def test_odd_sizes(C, T, H, V, dtype):
    options = dict(window=1000, softcap=30.0, splits=3)
    shapes = dict(B=3, S=240 * 16, N=12, K=4, C=C, T=T, H=H, V=V)
    assert_kernel(compile_on("v5e:2x2", dtype=dtype, **shapes, **options)[0])


@pytest.mark.parametrize("target", calls.GPUS)
def test_without_a_kernel_by_default(target):
    found, compiled = compile_on(target, B=16)
    assert not found
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 10


def test_a_batch_on_gpu():
    assert_kernel_on_gpu(B=16, S=4096)


def test_latent_on_gpu():
    """Rows for two blocks, values in two parts."""
    assert_kernel_on_gpu(B=8, S=LONG, N=128, K=1, H=576, V=None, value_dim=512)


def test_odd_sizes_on_gpu():
    options = dict(window=1000, softcap=30.0, splits=3, dtype="float16")
    assert_kernel_on_gpu(B=3, S=240 * 16, N=96, K=4, C=24, T=3, H=80, V=48, **options)
