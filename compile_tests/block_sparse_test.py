"""The kernels of block_sparse, compiled for every TPU and for H100."""

import functools

import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks
from attnjax.ops import selected_block_attention as ops
from compile_tests import calls
from experiments import targets

LONG = 128 * 1024
NAMES = ["block_sparse", "block_sparse_dkv", "block_sparse_dq"]
ON_GPU = ["flash_attention", "flash_attention_dkv", "flash_attention_dq"]


def shapes(T, *, dtype="bfloat16", N=4, K=2, H=128, V=128, A=3, query_block=1, packed=False):
    token = lambda heads, size: jax.ShapeDtypeStruct((1, T, heads, size), dtype)
    args = dict(q=token(N, H), k=token(K, H), v=token(K, V))
    args["selected"] = jax.ShapeDtypeStruct((1, -(-T // query_block), N, A), "int32")
    if packed:
        args |= dict(ids=jax.ShapeDtypeStruct((1, T), "int32"))
        args |= dict(valid=jax.ShapeDtypeStruct((1, T), "bool"))
    return args


def attend(args, **options):
    args, mask = dict(args), masks.Causal()
    if "ids" in args:
        mask = mask & masks.Segments(args.pop("ids")) & masks.Valid(args.pop("valid"))
    return ops.selected_block_attention(**args, mask=mask, **options)


def gradients(args, **options):
    learned = {name: args[name] for name in "qkv"}
    out, vjp = jax.vjp(lambda learned: attend(args | learned, **options), learned)
    return out, vjp(jnp.ones_like(out))


def compiled_kernels(target, args, **options):
    """All three, each within the fast memory that a kernel has."""
    compiled = targets.compile_for(target, functools.partial(gradients, **options), args)
    found = calls.kernels(compiled)
    assert sorted(x.name for x in found) == NAMES
    assert all(0 < call.vmem < calls.VMEM for call in found)
    return compiled


@pytest.mark.parametrize(
    ("target", "T"), [("v5e:2x2", LONG), ("v5p:2x2x1", 4096), ("v6e:2x2", 4096)]
)
def test_three_blocks_of_512_for_each_query(target, T):
    compiled = compiled_kernels(target, shapes(T), block=512)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 20 * memory.argument_size_in_bytes  # no T T anywhere


@pytest.mark.parametrize(
    ("target", "T"), [("v5e:2x2", 4096), ("v5p:2x2x1", LONG), ("v6e:2x2", LONG)]
)
def test_sixteen_blocks_of_64_for_each_run_of_queries(target, T):
    args = shapes(T, A=16, query_block=128)
    compiled = compiled_kernels(target, args, block=64, query_block=128)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * memory.argument_size_in_bytes  # nothing A times


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (dict(block=504), dict(T=4000, H=512, V=192, packed=True, dtype="float32")),
        (dict(block=2000), dict(T=5000, H=24, V=40, packed=True)),  # a block in parts
        (dict(block=100, query_block=100), dict(T=4050, query_block=100, packed=True)),
    ],
)
def test_odd_sizes(options, sizes):
    compiled_kernels("v5e:2x2", shapes(**sizes), **options)


@pytest.mark.parametrize(
    ("T", "A", "sizes", "most"),
    [
        (LONG, 3, dict(block=512), 10),
        (4096, 4, dict(block=128, query_block=128), 2),
    ],
)
def test_h100(T, A, sizes, most):
    """A query is copied for each block that it selects, but in runs and blocks of whole tiles."""
    args = shapes(T, A=A, query_block=sizes.get("query_block", 1), packed=T == 4096)
    by_kernel = functools.partial(gradients, implementation="pallas", **sizes)
    compiled = targets.compile_for("h100:1", by_kernel, args)
    assert sorted(x.name for x in calls.kernels(compiled)) == ON_GPU
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < most * memory.argument_size_in_bytes  # no T T anywhere
