"""The lists that a block of threads walks along, what fits Hopper, and what the kernel refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention as kernels
from pallas_kernels.flash_attention import mosaic_gpu
from pallas_kernels.flash_attention.mosaic_gpu import tile_sizes, walk

STATES = np.array([[[[2, 0, 1], [1, 2, 2], [0, 0, 0]], [[0, 0, 1], [0, 0, 0], [2, 1, 2]]]])


def visited(states, over, n, i):
    """The first queries or keys of a list's steps, with 1000 more where the tile is partial."""
    plan = walk.walk(states, over=over, tile=128, step=64)

    def note(carry, begin, partial):
        count, found = carry
        return count + 1, found.at[count].set(begin() + 1000 * partial)

    count, found = plan.each(plan.tables, (0, n, i), note, (0, jnp.zeros(8, int)))
    return found[:count].tolist()


@pytest.mark.parametrize("traced", [False, True])
def test_full_tiles_come_first(traced):
    states = jnp.asarray(STATES) if traced else STATES
    assert visited(states, "row", 0, 0) == [0, 64, 1256, 1320]
    assert visited(states, "row", 0, 1) == [128, 192, 256, 320, 1000, 1064]
    assert visited(states, "row", 0, 2) == []
    assert visited(states, "column", 0, 2) == [128, 192, 1000, 1064]
    assert visited(states, "column", 1, 1) == [1256, 1320]


def test_members_of_a_tile():
    """The batch entries and heads that share a tile, in the order of flat indices, full first."""
    states = np.array([[[2, 1]], [[1, 1]], [[2, 0]]])[None]  # of three heads, two tiles
    plan = walk.members(states, counts=(2, 3), blocks=(1, 1))
    order, counts = (np.asarray(x) for x in plan.tables)
    assert order[0, 0, 0].tolist() == [0, 2, 3, 5, 1, 4] and counts[0, 0, 0].tolist() == [4, 6]
    assert order[0, 0, 1, :4].tolist() == [0, 1, 3, 4] and counts[0, 0, 1].tolist() == [0, 4]
    apart = walk.members(states, counts=(2, 3), blocks=(1, 3))
    assert apart.tables[1].tolist() == [[[[2, 2], [0, 2]], [[0, 2], [0, 2]], [[2, 2], [0, 0]]]]


@pytest.mark.parametrize(
    ("kept", "fetched", "size", "stages"),
    [
        (256, 256, 128, 2),
        (1024, 512, 64, 2),
        (1024, 1536, 16, 2),
        (1024, 5000, 16, 1),
    ],
)
def test_the_largest_steps_that_fit(kept, fetched, size, stages):
    """Two, or else one."""
    held, stage = (lambda size: 128 * kept), (lambda size: size * fetched)
    steps = tile_sizes.steps(held, stage, most=128)
    assert steps.size == size and steps.stages >= stages
    assert held(size) + steps.stages * stage(size) < 227 * 1024


def test_wrong_arguments():
    def attend(length=200, tiles=2, width=64, dtype="bfloat16", states=None):
        shape, t = jax.ShapeDtypeStruct((1, length, 1, width), dtype), np.arange(length)
        states = np.full((1, 1, tiles, tiles), kernels.FULL) if states is None else states
        run = lambda q: mosaic_gpu.flash_attention(q, q, q, t, t, kernels.Mask(states), scale=1.0)
        jax.eval_shape(run, shape)

    with pytest.raises(ValueError, match=r"\(1, 1, 3, 3\) must be for \(2, 2\) tiles of 128"):
        attend(tiles=3)
    with pytest.raises(NotImplementedError, match=r"or float32, not \['float8_e4m3fn'\]"):
        attend(dtype="float8_e4m3fn")
    with pytest.raises(NotImplementedError, match="heads of 256 in bfloat16, not 320"):
        attend(width=320)
    with jax.default_matmul_precision("high"):
        attend(dtype="float32")
        with pytest.raises(NotImplementedError, match="heads of 128 in float32, not 192"):
            attend(dtype="float32", width=192)
    many = np.broadcast_to(np.int8(2), (4096, 2048, 2, 2))
    with pytest.raises(NotImplementedError, match="must be 16777216 or fewer"):
        attend(states=many)
