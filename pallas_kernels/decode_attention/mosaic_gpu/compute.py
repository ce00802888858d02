"""What a warpgroup does that computes.

Source of the sums: Milakov and Gimelshein, "Online normalizer calculation for softmax".
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.mosaic_gpu.steps import ROWS
from pallas_kernels.decode_attention.mosaic_gpu.work import Work
from pallas_kernels.flash_attention.mosaic_gpu import tile


def compute(work: Work, o_ref, lse_ref):
    """An online softmax over all steps; exponents are of base 2, which is what the hardware has."""
    sizes, shared = work.sizes, work.shared
    for stage in range(sizes.stages):
        plgpu.barrier_arrive(shared.free.at[stage])
    plgpu.barrier_wait(shared.arrived)
    parts = range(0, sizes.columns, sizes.width)
    full = lambda x, *size: jnp.full((ROWS, *size), x, jnp.float32)
    carry = tuple(full(0, sizes.width) for _ in parts), full(-jnp.inf), full(0)
    for i, masked in enumerate((True, False, True)):
        add = functools.partial(_add, work, masked)
        carry = lax.fori_loop(work.bounds[i], work.bounds[i + 1], add, carry)
    sums, peak, total = carry
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    at = work.split, work.b, work.head, pl.ds(work.row(work.mine), sizes.rows)
    staged = shared.o.at[work.group]
    for x, begin in zip(sums, parts, strict=True):
        staged[...] = x / tile.along(total, x.shape, 0)
        _write(staged, o_ref.at[*at, pl.ds(work.column + begin, sizes.width)], sizes.rows)
    staged = shared.lse.at[work.group]
    staged[...] = jnp.where(seen, (peak + jnp.log2(total)) / tile.LOG2E, -jnp.inf)
    once = True if sizes.by_rows else work.group == 0
    pl.when(once)(functools.partial(_write, staged, lse_ref.at[*at], sizes.rows))


def _add(work, masked, step, carry):
    """The sums over one step more, and the peaks and totals of rows."""
    (sums, peak, total), shared, stage = carry, work.shared, work.stage(step)
    plgpu.barrier_wait(shared.ready[0].at[stage])
    y = tile.product(shared.q.at[work.mine], shared.ring[0].at[stage].T)
    y = _capped(work.options, y)
    if masked:
        y = jnp.where(_seen(work, step, y.shape), y, -jnp.inf)
    higher = jnp.maximum(peak, y.max(1))
    shift = jnp.where(higher == -jnp.inf, 0.0, higher)  # -inf - -inf is NaN
    weights, decay = jnp.exp2(y - tile.along(shift, y.shape, 0)), jnp.exp2(peak - shift)
    total = total * decay + weights.sum(1)
    mine = shared.weights.at[work.group]
    mine[...] = weights.astype(mine.dtype)
    plgpu.commit_smem()
    if len(shared.ring) > 1:
        plgpu.barrier_wait(shared.ready[1].at[stage])
    parts = range(0, work.sizes.columns, work.sizes.width)
    values = [pl.ds(work.column + begin, work.sizes.width) for begin in parts]
    v = shared.ring[-1].at[stage]
    sums = tuple(
        x * tile.along(decay, x.shape, 0) + tile.product(mine, v.at[:, part])
        for x, part in zip(sums, values, strict=True)
    )
    plgpu.barrier_arrive(shared.free.at[stage])
    return sums, higher, total


def _capped(options, products):
    """Scores in base 2."""
    scale = options.scale * tile.LOG2E
    if options.softcap is None:
        return products * scale
    # the hardware's own tanh has 11 bits
    bent = 1 - 2 / (1 + jnp.exp2(products * (2 * scale / options.softcap)))
    return bent * (options.softcap * tile.LOG2E)


def _seen(work, step, shape):
    """Which keys of a step each row sees."""
    options, (length, start, _) = work.options, work.ends
    row = work.row(work.mine) + lax.broadcasted_iota(jnp.int32, shape, 0)
    t = start + (lax.div(row, jnp.int32(options.G)) if options.T > 1 else 0 * row)
    s = step * work.sizes.keys + lax.broadcasted_iota(jnp.int32, shape, 1)
    seen = (s <= t) & (s < length)
    return seen if options.window is None else seen & (s >= t - options.window)


def _write(staged, output, rows):
    """Copies the rows that exist to where they go."""
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, rows)], output)
    plgpu.wait_smem_to_gmem(0)
