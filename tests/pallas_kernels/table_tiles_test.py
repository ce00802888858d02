"""Attention to blocks, to pages and to neighborhoods takes what the table in force says."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.ops import tuning_candidates
from attnjax.ops.neighborhood_attention import neighborhood_attention
from attnjax.ops.selected_block_attention import selected_block_attention
from pallas_kernels import block_sparse, decode_attention, placing, tables

OPERATIONS = "block_sparse_attention", "decode_attention", "neighborhood_attention"
RULE = {"how": "computed", "rule": "r"}


def table_of(operation, implementation, platform, **tiles):
    row = tables.Row(operation=operation, implementation=implementation, tiles=tiles, source=RULE)
    return tables.Table("x", platform, (row,))


def selected_blocks(q, **options):
    """Of blocks of 32 keys: each query's own, and the one before it or the next."""
    own = jnp.arange(q.shape[1]) // 32
    selected = jnp.stack([own, jnp.abs(own - 1)], -1)[None, :, None]
    selected = jnp.broadcast_to(selected, (*q.shape[:3], 2))
    return selected_block_attention(q, q, q, selected, block=32, **options)


def pages(q, **options):
    """Of 8 tokens."""
    pool, lengths = q.reshape(-1, 2, 8, 16), jnp.array([30, 64])
    table = jnp.arange(16).reshape(2, 8)
    new = q[:, :2].reshape(2, 1, 2, 16)
    return decode_attention.decode_attention(new, pool, pool, table, lengths, scale=1.0, **options)[
        0
    ]


def groups(q, **options):
    q = q.reshape(1, 16, 8, 2, 16)
    return neighborhood_attention(q, q, q, **options)


CALLS = dict(zip(OPERATIONS, (selected_blocks, pages, groups), strict=True))
Q = jnp.sin(jnp.arange(1 * 128 * 2 * 16, dtype="float32")).reshape(1, 128, 2, 16)


def traced(operation, implementation, table=None):
    program = jax.jit(lambda q: CALLS[operation](q, implementation=implementation))  # traced anew
    with tables.using(table or tables.Table("x")):
        return str(program.trace(Q.astype("bfloat16")).jaxpr)


by_rule = functools.cache(traced)


@pytest.mark.parametrize("operation, platform, size, more", [
    ("block_sparse_attention", "cpu", dict(block_q=8), {}),
    ("block_sparse_attention", "tpu", dict(block_q=16), dict(block_k=16)),
    ("decode_attention", "cpu", dict(keys=8), dict(rows=8)),
    ("decode_attention", "tpu", dict(keys=16), {}),
    ("decode_attention", "cuda", dict(keys=16), dict(blocks=8)),
    ("neighborhood_attention", "tpu", dict(pack=2), dict(packs=1)),
    ("neighborhood_attention", "cuda", dict(pack=2), {}),
])  # fmt: skip
def test_sizes_are_those_of_the_table(operation, platform, size, more):
    implementation = "xla" if platform == "cpu" else "pallas"
    table = functools.partial(table_of, operation, implementation)
    trace = functools.partial(traced, operation, implementation)
    found = [by_rule(operation, implementation), trace(table(platform, **size))]
    found += [trace(table(platform, **size, **more))] if more else []
    assert len(set(found)) == len(found)
    if implementation == "pallas":  # a table has nothing to say of another platform's kernel
        assert trace(table("cpu", **size)) == found[0]
    with pytest.raises(ValueError, match="'other' of Row.* isn't a size to choose; these are: "):
        trace(table(platform, other=1))
    with pytest.raises(ValueError, match=r"=0 of Row.* must be a multiple of \d+ > 0"):
        trace(table(platform, **dict.fromkeys(size, 0)))


@pytest.mark.parametrize("operation, platform", [
    ("block_sparse_attention", "cuda"), ("neighborhood_attention", "cpu")
])  # fmt: skip
def test_forms_without_a_size_to_choose(operation, platform):
    implementation = "xla" if platform == "cpu" else "pallas"
    table = table_of(operation, implementation, platform, block_q=64)
    with pytest.raises(ValueError, match="isn't a size to choose; these are: none"):
        traced(operation, implementation, table)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_implementations_are_those_of_the_table(monkeypatch, operation):
    monkeypatch.setattr(placing, "whole", lambda: True)

    def kernels(implementation):
        table = table_of(operation, implementation, "tpu") if implementation else None
        return traced(operation, None, table).count("pallas_call")

    assert kernels(None) == kernels("pallas") == 1 and kernels("xla") == 0
    with pytest.raises(ValueError, match="must name 'xla', or a kernel that there is for tpu"):
        kernels("new")


@pytest.mark.parametrize("operation, tiles", [
    ("block_sparse_attention", dict(block_q=32, block_k=16)),
    ("neighborhood_attention", dict(pack=3)),
])  # fmt: skip
def test_uneven_tiles_change_nothing(operation, tiles):
    def run(q):
        o, vjp = jax.vjp(lambda q: CALLS[operation](q, implementation="interpret"), q)
        return o, vjp(jnp.cos(o))

    with tables.using(table_of(operation, "pallas", "tpu", **tiles)):
        found = jax.jit(lambda q: run(q))(Q)
    chex.assert_trees_all_close(found, jax.jit(lambda q: run(q))(Q), rtol=1e-5, atol=1e-5)


def test_tiles_that_there_is_no_room_for():
    q = jax.ShapeDtypeStruct((1, 2**17, 1, 128), "bfloat16")
    selected = jax.ShapeDtypeStruct((1, 2**17, 1, 8), "int32")

    def plan(**tiles):
        with tables.using(table_of("block_sparse_attention", "pallas", "tpu", **tiles)):
            return block_sparse.plan_of(q, q, q, selected, block=1024)

    assert plan()[:3] == (1, 512, 2) == plan(block_q=16)[:3]  # too many pairs
    assert plan(block_q=2**14)[:3] == (1, 1024, 2)  # halved
    assert plan(block_q=256, block_k=1024)[:3] == (1, 256, 1)
    with pytest.raises(ValueError, match="block_k=24 of Row.* must be a multiple of 16"):
        plan(block_k=24)
    with pytest.raises(ValueError, match="keys=48 of a step on Hopper must be one of"):
        table = table_of("decode_attention", "pallas", "cuda", keys=48)
        traced("decode_attention", "pallas", table)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_candidates_can_be(operation, platform):
    """What is measured has names and sizes that its form knows."""
    for implementation, tiles in tuning_candidates.CANDIDATES[operation][platform]:
        if tiles and (implementation == "xla") == (platform == "cpu"):
            table = table_of(operation, implementation, platform, **dict(tiles))
            assert traced(operation, implementation, table)
