"""What a kernel reads, what its warpgroups share, and where one of them is."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention import part as maths
from pallas_kernels.decode_attention.mosaic_gpu import steps as schedule
from pallas_kernels.decode_attention.mosaic_gpu.steps import ROWS


class Inputs(NamedTuple):
    """What a kernel reads from global memory."""

    q: Any  # (B K R H)
    pools: tuple  # keys (P K C H), and values if they aren't a part of them
    tails: Any  # the last unit of each sequence, and an empty one (B + 1 K unit F)
    table: Any  # (B L)
    bounds: Any  # (B X 4)
    ends: Any  # (B 3), of `schedule.Ends`


class Shared(NamedTuple):
    """Shared memory, and the barriers that say when it may be read and written."""

    q: Any
    ring: tuple  # of each pool
    weights: Any
    o: Any
    lse: Any
    arrived: Any  # queries
    ready: tuple  # a stage of each pool
    free: Any  # a stage


def shared_memory(sizes, inputs):
    """The types of `Shared`."""
    dtype, groups, stages = inputs.q.dtype, sizes.groups, sizes.stages
    # what is multiplied must be laid out alike
    tiling = plgpu.TilingTransform((8, sizes.features))
    swizzle = plgpu.SwizzleTransform(2 * sizes.features)
    matrix = lambda *shape: plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))
    return Shared(
        q=matrix(sizes.row_tiles, ROWS, inputs.q.shape[-1]),
        ring=tuple(matrix(stages, sizes.keys, x.shape[-1]) for x in inputs.pools),
        weights=matrix(groups, ROWS, sizes.keys),
        o=plgpu.SMEM((groups, ROWS, sizes.width), jnp.float32),
        lse=plgpu.SMEM((groups, ROWS), jnp.float32),
        arrived=plgpu.Barrier(num_arrivals=sizes.row_tiles),
        ready=tuple(
            plgpu.Barrier(num_arrivals=sizes.units, num_barriers=stages) for _ in inputs.pools
        ),
        free=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
    )


class Work(NamedTuple):
    """Where a warpgroup is, and what it sees."""

    options: maths.Options
    sizes: schedule.Sizes
    inputs: Inputs
    shared: Shared
    b: Any
    head: Any
    split: Any
    tile: Any
    group: Any
    bounds: list  # of its steps, as in `schedule.bounds`
    ends: schedule.Ends  # of its sequence

    def stage(self, step):
        return lax.rem(step - self.bounds[0], self.sizes.stages)

    def row(self, i):
        """The first of the i-th rows that the block has."""
        return (self.tile * self.sizes.row_tiles + i) * ROWS

    @property
    def mine(self):
        """Which of the block's rows a warpgroup has."""
        return self.group if self.sizes.by_rows else 0

    @property
    def column(self):
        """Of values, the first that a warpgroup has."""
        return 0 if self.sizes.by_rows else self.group * self.sizes.columns
