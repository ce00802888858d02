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


@pytest.mark.parametrize("width", [64, 128, 192, 256])
def test_two_steps_fit_at_every_width(width):
    for kept, scores in ((2 * width, 1), (2 * width, 2)):
        steps = tile_sizes.steps(kept, 2 * width, scores, most=64)
        assert steps.stages >= 2 and steps.size in (32, 64)
        held = 2 * (128 * (kept + scores * steps.size) + steps.stages * steps.size * 2 * width)
        assert held < 227 * 1024


def test_wrong_arguments():
    def attend(length=200, tiles=2, width=64, dtype="bfloat16", states=None):
        shape, t = jax.ShapeDtypeStruct((1, length, 1, width), dtype), np.arange(length)
        states = np.full((1, 1, tiles, tiles), kernels.FULL) if states is None else states
        run = lambda q: mosaic_gpu.flash_attention(q, q, q, t, t, kernels.Mask(states), scale=1.0)
        jax.eval_shape(run, shape)

    with pytest.raises(ValueError, match=r"\(1, 1, 3, 3\) must be for \(2, 2\) tiles of 128"):
        attend(tiles=3)
    with pytest.raises(NotImplementedError, match=r"bfloat16 or float16, not \['float32'\]"):
        attend(dtype="float32")
    with pytest.raises(NotImplementedError, match="heads of 256, not 320"):
        attend(width=320)
    many = np.broadcast_to(np.int8(2), (4096, 2048, 2, 2))
    with pytest.raises(NotImplementedError, match="must be 16777216 or fewer"):
        attend(states=many)
