"""A Pallas kernel for TPU: a step takes some pages of one sequence, which the table names.

A grid is (splits, steps). The steps go through the sequences one after the other, each with as many
as its own length needs, so that short sequences beside a long one cost nothing. While a step is
computed, the pages of the next are copied, each of them a block of its own.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import device_table
from pallas_kernels.decode_attention import part as maths
from pallas_kernels.decode_attention import steps as schedule

_KEYS = 1024  # of a step at most: more would be wasted on short sequences
_MOST_PAGES = 16  # of a step: each is a copy to start
_PAGES_BYTES = 4 * 2**20  # of VMEM, for pages that are there and on their way
_SCORES_BYTES = 4 * 2**20  # of VMEM, for scores and what is made of them
_ROWS_BYTES = 4 * 2**20  # of VMEM, for queries, outputs and sums
_MOST_WORDS = 2**17  # half of a TPU's scalar memory
_TWO_CORES = ("TPU v4", "TPU v5")  # that share a grid


def pages_of(q, k, v, table, *, V: int) -> int:
    """How many pages a step takes; 0 where one is too large, or scalar memory too small.

    They have `keys` of the table of the device at most, or else 1024: one page at least, and as
    many as fast memory has room for. Where scalar memory can't hold so many steps as the table
    makes, they have 1024 too. q is (B K R H).
    """
    (_, K, R, _), (*_, C, H), (B, L) = q.shape, k.shape, table.shape
    lanes = lambda size: -(-size // 128) * 128
    rows = K * (-(-R // 8) * 8)
    if rows * (2 * lanes(H) * q.dtype.itemsize + 4 * (3 * lanes(V) + 4 * 128)) > _ROWS_BYTES:
        return 0
    width = lanes(H) + (0 if v is None else lanes(V))
    page, scores = 2 * K * C * width * k.dtype.itemsize, 3 * 4 * rows * C
    most = min(_PAGES_BYTES // page, _SCORES_BYTES // scores, _MOST_PAGES, L)
    keys = device_table.tiles(k, table, V, dict(keys=_KEYS), kernel_for="tpu")["keys"]
    fits = lambda pages: pages and schedule.words(B, L, pages) <= _MOST_WORDS
    tried = (min(most, max(1, size // C)) for size in (keys, _KEYS))
    return next(filter(fits, tried), 0)


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

    Raises NotImplementedError where memory doesn't suffice.
    """
    (B, K, R, H), pages = q.shape, pages_of(q, k, v, table, V=V)
    if not pages:
        raise NotImplementedError(
            f"pages {k.shape}, {R} queries of a key head or a table {table.shape} don't fit the "
            "memory of the kernel for TPU; 'xla' needs none"
        )
    splits = splits or _cores()
    sizes = dict(C=k.shape[2], splits=splits, pages=pages)
    steps, count = schedule.make(options, table, lengths, starts, **sizes)
    pools = [k] if v is None else [k, v]
    block = lambda *shape: pl.BlockSpec((None, None, *shape), _of_part)
    like = lambda size: jax.ShapeDtypeStruct(
        (splits, B, K, R, size), jnp.float32, manual_axis_type=jax.typeof(q).mat
    )
    o, lse = pl.pallas_call(
        functools.partial(_kernel, options, pages, V),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(steps),
            grid=(splits, count),
            in_specs=[
                pl.BlockSpec((None, K, R, H), lambda *ids: _of_part(*ids)[1:]),
                [[_page_spec(pool, i, pages) for i in range(pages)] for pool in pools],
            ],
            out_specs=[block(K, R, V), block(K, R, 1)],
            scratch_shapes=[pltpu.VMEM((K, R, size), jnp.float32) for size in (V, 1, 1)],
        ),
        out_shape=[like(V), like(1)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(q, pools, table, V),
        interpret=interpret,
        name="decode_attention",
    )(*steps, q, [[pool] * pages for pool in pools])
    return maths.merge(o, lse)


def _cores():
    """How many cores of the device that is traced for share a grid."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return 2 if (device or jax.devices()[0]).device_kind in _TWO_CORES else 1


def _of_part(x, step, *steps):
    """The block of a part's queries or outputs."""
    return x, schedule.Steps(*steps).owner[step], 0, 0, 0


def _page_spec(pool, i, pages):
    """The i-th page of each step."""
    P, K, C, H = pool.shape

    def index(x, step, *steps):
        page = schedule.Steps(*steps).page(x, step, pages, i, C)
        return jnp.clip(page, 0, P - 1), 0, 0, 0

    return pl.BlockSpec((None, K, C, H), index)


def _kernel(options, pages, V, *refs):
    steps, (q_ref, pools, o_ref, lse_ref, *sums) = schedule.Steps(*refs[:6]), refs[6:]
    sums, C = maths.Sums(*sums), pools[0][0].shape[1]
    x, step = pl.program_id(0), pl.program_id(1)
    b, page = steps.place(x, step, pages)
    span = maths.Span(page * C, steps.lengths[b], steps.starts[b])

    @pl.when(step == steps.begin[b])
    def _():
        _store(sums, maths.empty(*q_ref.shape[:2], V))

    def add(masked):
        k, *v = (jnp.concatenate([ref[...] for ref in pool], 1) for pool in pools)
        v = v[0] if v else k[..., :V]
        so_far = maths.Sums(*(ref[...] for ref in sums))
        _store(sums, maths.add(options, so_far, q_ref[...], k, v, span, masked=masked))

    some, every = _seen(options, span, pages * C)
    pl.when(every)(functools.partial(add, False))
    pl.when(some & ~every)(functools.partial(add, True))

    @pl.when(step == steps.begin[b + 1] - 1)
    def _():
        o_ref[...], lse_ref[...] = maths.close(maths.Sums(*(ref[...] for ref in sums)))


def _seen(options, span, size):
    """(whether any query may see a key here, whether all see all)."""
    after, last = span.first + size, span.start + options.T - 1
    some = (span.first < span.stop) & (span.first <= last)
    every = (after <= span.stop) & (after <= span.start + 1)
    if options.window is not None:
        every = every & (span.first >= last - options.window)
    return some, every


def _store(refs, values):
    for ref, value in zip(refs, values, strict=True):
        ref[...] = value


def _cost(q, pools, table, V):
    """What XLA can't see inside the kernel, for sequences that fill their pages."""
    B, K, R, H = q.shape
    keys = table.size * pools[0].shape[2]
    page = sum(x[0].size * x.dtype.itemsize for x in pools)
    return pl.CostEstimate(
        flops=2 * keys * K * R * (H + V),
        transcendentals=keys * K * R,
        bytes_accessed=table.size * page + 2 * q.size * q.dtype.itemsize,
    )
