"""A Pallas kernel for Hopper GPUs: a block of threads for each sequence, key head, split and tile.

One warpgroup only fetches: step by step into a ring of stages in shared memory, each page of a step
by a copy of its own, whose number stands in the table. One or two others compute: 64 rows of
queries each, or where values are wide the same rows and half of the features each. Rows that don't
exist are multiplied too, as a product has no fewer. That isn't what takes the time where they are
most: by the H100's data sheet a step of 64 keys and values of 128 features (32 KiB) is read in 1.3
microseconds, of 132 such steps at once, and multiplied in 0.3. With sums of 256 features in a
warpgroup (values of 256 or 512) registers don't suffice: 0.6 to 1.5 KB a thread are spilled.

Source of this division of work: Shah et al., "FlashAttention-3", section 3.1.
"""

import inspect

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.decode_attention import device_table
from pallas_kernels.decode_attention import part as maths
from pallas_kernels.decode_attention.mosaic_gpu import compute, fetch
from pallas_kernels.decode_attention.mosaic_gpu import steps as schedule
from pallas_kernels.decode_attention.mosaic_gpu.work import Inputs, Work, shared_memory

_COMPUTING, _FETCHING = 240, 24  # registers of a thread, where 384 share 65536
_BLOCKS = 132  # that an H100 runs at once


def attend(
    options: maths.Options,
    q,
    k,
    v,
    table,
    lengths,
    starts,
    *,
    V: int,
    splits: int | None,
    interpret=False,
):
    """(o (B K R V), lse (B K R 1)) of q (B K R H), in float32.

    A step has `keys` of the table of the device, or 64, at most, and there are as many splits as
    make its `blocks` of threads, or 132.

    Raises NotImplementedError for dtypes, pages, features and devices that the kernel isn't for,
    and ValueError for a row with keys other than 64, 32 and 16.
    """
    hopper.check_device(interpret)
    rules = dict(keys=None, blocks=_BLOCKS)
    most = device_table.tiles(k, table, V, rules, kernel_for="cuda")
    sizes, (B, K, R, _) = schedule.Sizes.of(q, k, v, V, most["keys"]), q.shape
    q = jnp.pad(q, ((0, 0), (0, 0), (0, sizes.padded(R) - R), (0, 0)))
    tiles, room = sizes.tiles(R), table.shape[1] * k.shape[2]
    splits = splits or max(1, min(most["blocks"] // (B * K * tiles), -(-room // sizes.keys)))
    pools = (k,) if v is None else (k, v)
    ends = schedule.Ends(lengths, starts, jnp.maximum(-(-lengths // sizes.unit) - 1, 0))
    inputs = Inputs(
        q,
        pools,
        schedule.tails(sizes, pools[-1], table, ends),
        table.astype(jnp.int32),
        schedule.bounds(options, lengths, starts, size=sizes.keys, splits=splits),
        jnp.stack(ends, 1).astype(jnp.int32),
    )
    o, lse = _call(options, sizes, inputs, splits, tiles, interpret)
    return maths.merge(o[..., :R, :], lse[..., :R, None])


def _call(options, sizes, inputs, splits, tiles, interpret):
    leaves, tree = jax.tree.flatten(inputs)
    B, K, R, _ = inputs.q.shape

    def decode_attention(*refs):
        inputs, (*outputs, shared) = tree.unflatten(refs[: len(leaves)]), refs[len(leaves) :]
        at = [lax.axis_index(name) for name in ("sequence", "head", "split", "tile", "group")]
        bounds = [inputs.bounds[at[0], at[2], i] for i in range(4)]
        ends = schedule.Ends(*(inputs.ends[at[0], i] for i in range(3)))
        work = Work(options, sizes, inputs, shared, *at, bounds, ends)

        @pl.when(work.group < sizes.groups)
        def _():
            _share_registers(sizes, _COMPUTING, "increase")
            compute.compute(work, *outputs)

        @pl.when(work.group == sizes.groups)
        def _():
            _share_registers(sizes, _FETCHING, "decrease")
            fetch.fetch(work)

    run = plgpu.kernel(
        decode_attention,
        out_type=[
            jax.ShapeDtypeStruct((splits, B, K, R, sizes.V), jnp.float32),
            jax.ShapeDtypeStruct((splits, B, K, R), jnp.float32),
        ],
        scratch_types=[shared_memory(sizes, inputs)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(B, K, splits, tiles),
        grid_names=("sequence", "head", "split", "tile"),
        num_threads=sizes.groups + 1,
        thread_name="group",
        interpret=interpret,
        **_cost(sizes, inputs),
    )
    # outputs vary over the axes of a mesh that queries vary over
    axes = tuple(jax.typeof(inputs.q).mat.varying)
    return [lax.pcast(x, axes, to="varying") for x in run(*leaves)]


def _share_registers(sizes, count, action):
    if sizes.groups > 1:  # of two warpgroups each thread has as many as it can address
        plgpu.set_max_registers(count, action=action)


def _cost(sizes, inputs):
    """What XLA can't see inside, for sequences that fill their pages; for jax >= 0.12."""
    if "cost_estimate" not in inspect.signature(plgpu.kernel).parameters:
        return {}
    (_, K, R, H), table = inputs.q.shape, inputs.table.size
    keys = table * inputs.pools[0].shape[2]
    page = sum(x[0].size * x.dtype.itemsize for x in inputs.pools)
    cost = pl.CostEstimate(
        flops=2 * keys * K * R * (H + sizes.V),
        transcendentals=keys * K * R,
        bytes_accessed=table * page,
    )
    return dict(cost_estimate=cost)
