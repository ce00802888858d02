"""What it computes is tested in matrix_test.py."""

import jax
import jax.numpy as jnp

from attnjax import parallel
from attnjax.core import registry
from tests.parallel import helpers, traffic

GQA = registry.get("gqa")


def sharded():
    return parallel.shard("ring_self_attention", GQA, helpers.mesh(context=4))


def qkv(T=16):
    return helpers.normal((2, T, 4, 8), (2, T, 2, 8), (2, T, 2, 6))


def test_keys_travel_and_then_values():
    q, k, v = qkv()
    assert traffic.sent(sharded(), dict(q=q, k=k, v=v)) == 4 * 3 * (k.size + v.size) // 4


def test_rows_of_scores_are_whole_and_nothing_is_gathered():
    arrays = [jax.ShapeDtypeStruct((1, 512, heads, 8), jnp.float32) for heads in (4, 2, 2)]
    program = jax.jit(sharded()).lower(*arrays).compile()
    text, rows = program.as_text(), 4 * 128 * 512 * 4  # bytes, of four heads
    assert "collective-permute" in text
    assert not any(name in text for name in ("all-gather", "all-to-all", "all-reduce"))
    assert rows <= program.memory_analysis().temp_size_in_bytes < 4 * rows  # 4 rows: all scores
