"""The order in which tiles are visited, what fits, and what the kernel refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention as kernels
from pallas_kernels.flash_attention import tile_sizes, walk

STATES = np.array([[[[2, 0, 0], [1, 2, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 0], [2, 2, 2]]]])


def visited(states, over, *, b=0, n=0, B=1, N=2, **summed):
    """[(row, column, state, first, last)] for each step of a unit, inner ones one by one."""
    plan = walk.walk(states, B=B, N=N, over=over, **summed)
    steps, inner = int(plan.grid[2]), plan.grid[3]
    ids = [
        (jnp.int32(b), jnp.int32(n), i, jnp.int32(j)) for i in range(steps) for j in range(inner)
    ]
    places = [plan.at(x, plan.tables) for x in ids]
    return [(int(x.row), int(x.column), int(x.state), bool(x.first), bool(x.last)) for x in places]


@pytest.mark.parametrize("traced", [False, True])
def test_rows_visit_their_tiles_one_after_the_other(traced):
    states = jnp.asarray(STATES) if traced else STATES
    first = visited(states, "row")
    assert first == [
        (0, 0, 2, True, True),
        (1, 0, 1, True, False),
        (1, 1, 2, False, True),
        (2, 0, 0, True, True),  # an empty row is still written
        (2, 0, 0, False, False),  # idle: the other head has one step more
    ]
    assert visited(states, "row", n=1) == [
        (0, 2, 1, True, True),
        (1, 0, 0, True, True),
        (2, 0, 2, True, False),
        (2, 1, 2, False, False),
        (2, 2, 2, False, True),
    ]


def test_heads_of_one_sum_are_visited_within_a_step():
    assert visited(STATES, "column", heads=2) == [
        (0, 0, 2, True, False),
        (0, 0, 0, False, False),
        (1, 0, 1, False, False),
        (1, 0, 0, False, False),
        (2, 0, 0, False, False),
        (2, 0, 2, False, True),
        (1, 1, 2, True, False),
        (1, 1, 0, False, False),
        (2, 1, 0, False, False),
        (2, 1, 2, False, True),
        (0, 2, 0, True, False),
        (0, 2, 1, False, False),
        (2, 2, 0, False, False),
        (2, 2, 2, False, True),
    ]


def test_every_tile_of_its_own_is_written():
    steps = visited(STATES, "tile")
    assert [x[:2] for x in steps] == [(i, j) for i in range(3) for j in range(3)]
    assert all(first and last for *_, first, last in steps)
    everything = visited(STATES, "all", heads=2)
    assert [x[3] for x in everything] == [True] + [False] * (len(everything) - 1)
    assert [x[4] for x in everything] == [False] * (len(everything) - 1) + [True]


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "unknown"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes_are_of_whole_lanes_and_no_larger_than_needed(kind, dtype):
    def check(q, k):
        sizes = kernels.choices(q, k, k, sheets=2, kind=kind)
        assert len(set(sizes)) == len(sizes)
        for size in sizes:
            assert size.block_q % 128 == size.block_k % 128 == 0
            assert size.block_q < q.shape[1] + 128 and size.block_k < k.shape[1] + 128
            assert tile_sizes.vmem(size, [256 * q.dtype.itemsize] * 3, 2) <= size.vmem

    for lengths in ((1, 5000), (300, 300), (2**17, 2**17)):
        jax.eval_shape(check, *(jax.ShapeDtypeStruct((1, n, 1, 256), dtype) for n in lengths))


def test_wrong_arguments():
    q, t = jnp.zeros((1, 40, 2, 8)), np.arange(40)
    options = dict(scale=1.0, sizes=kernels.Sizes(16, 16, 2**20), interpret=True)
    mask = kernels.Mask(np.full((1, 1, 3, 3), kernels.PARTIAL))
    with pytest.raises(ValueError, match=r"states of shape \(1, 1, 3, 3\) must be for \(2, 3\)"):
        kernels.flash_attention(q[:, :30], q, q, t[:30], t, mask, **options)
    with pytest.raises(ValueError, match="keys of bfloat16 must have the dtype of queries"):
        kernels.flash_attention(q, q.astype(jnp.bfloat16), q, t, t, mask, **options)
    q, t = jax.ShapeDtypeStruct((1, 16 * 300, 1, 8), "float32"), np.arange(16 * 300)
    mask = kernels.Mask(np.full((1, 1, 300, 300), kernels.FULL))
    with pytest.raises(NotImplementedError, match="don't fit scalar memory"):
        jax.eval_shape(lambda q: kernels.flash_attention(q, q, q, t, t, mask, **options), q)
