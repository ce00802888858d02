"""What the warpgroup does that only fetches."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.mosaic_gpu.work import Work


def fetch(work: Work):
    """Fetches the queries and all steps."""
    sizes, shared, inputs = work.sizes, work.shared, work.inputs
    for i in range(sizes.row_tiles):
        q = inputs.q.at[work.b, work.head, pl.ds(work.row(i), sizes.rows)]
        plgpu.copy_gmem_to_smem(q, shared.q.at[i, pl.ds(0, sizes.rows)], shared.arrived)
    last = work.ends.last

    def pages(step):
        """Of its units, in the pool; those after the last are the last again."""
        units = [jnp.minimum(step * sizes.units + i, last) for i in range(sizes.units)]
        return [inputs.table[work.b, lax.div(unit, sizes.of_page)] for unit in units]

    def visit(step, found):
        following = pages(step + 1)  # which are on their way meanwhile
        plgpu.barrier_wait(shared.free.at[work.stage(step)])
        for i, page in enumerate(found):
            _copy(work, step, i, page, last)
        return following

    begin, *_, end = work.bounds
    lax.fori_loop(begin, end, visit, pages(begin))
    for stage in range(sizes.stages):  # every phase of a barrier is to be waited for
        plgpu.barrier_wait(shared.free.at[stage])


def _copy(work, step, i, page, last):
    """Begins to copy a step's i-th unit of each pool.

    What isn't a token may be anything, which a weight of zero wouldn't take out of values: the last
    units, and those after them, come from where it is zero.
    """
    sizes, shared, inputs = work.sizes, work.shared, work.inputs
    unit, stage = step * sizes.units + i, work.stage(step)
    begin = lax.rem(jnp.minimum(unit, last), sizes.of_page) * sizes.unit
    for n, pool in enumerate(inputs.pools):
        memory = shared.ring[n].at[stage, pl.ds(i * sizes.unit, sizes.unit)]
        copy = functools.partial(
            plgpu.copy_gmem_to_smem, dst=memory, barrier=shared.ready[n].at[stage]
        )
        of_page = pool.at[page, work.head, pl.ds(begin, sizes.unit)]
        if n < len(inputs.pools) - 1:
            copy(of_page)
            continue
        owner = jnp.where(unit == last, work.b, inputs.tails.shape[0] - 1)
        pl.when(unit < last)(functools.partial(copy, of_page))
        pl.when(unit >= last)(functools.partial(copy, inputs.tails.at[owner, work.head]))
