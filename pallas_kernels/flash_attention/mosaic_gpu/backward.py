"""The backward kernels: each tile's weights again from lse, and sums over rows or columns.

    dy_ts = p_ts (do_t . v_s - delta_t),    dx = scale (1 - (x / softcap)^2) dy
    dq_t = sum_s dx_ts k_s,    dk_s = sum_t dx_ts q_t,    dv_s = sum_t p_ts do_t

p = exp(y - lse), delta = do . o - dlse. Each sum is made by one warpgroup, in a fixed order, so
results are the same each time. Source: Dao, "FlashAttention-2", algorithm 2; Shah et al.,
"FlashAttention-3", appendix B.

Unlike there: a kernel for each of (dq) and (dk, dv), so that none needs atomic additions; and where
heads are too wide for the registers of both, one for each of dk and dv.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.mosaic_gpu import call as calls
from pallas_kernels.flash_attention.mosaic_gpu import tile as maths
from pallas_kernels.flash_attention.mosaic_gpu import tile_sizes
from pallas_kernels.flash_attention.mosaic_gpu import walk as walks
from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import ROWS, TILE
from pallas_kernels.flash_attention.mosaic_gpu.work import Inputs, Work

_MOST = 64  # columns that registers hold beside the sums
_BOTH = 256  # features of dk and dv that they hold at once


class Others(NamedTuple):
    """What stays in global memory; lse and delta (B N T) where queries are kept."""

    asked: maths.Asked
    lse: Any = None
    delta: Any = None


def queries(options: maths.Options, q, k, v, do, lse, delta, asked, states, *, interpret):
    """The gradient of q; lse in base 2, and inf for a query that sees nothing."""
    size = q.shape[-1] + v.shape[-1]
    steps = tile_sizes.steps(size, size, scores=1, most=_MOST)
    [dq] = calls.call(
        functools.partial(_queries, options),
        walks.walk(states, over="row", tile=TILE, step=steps.size),
        steps,
        Inputs(kept=(q, do), fetched=((k,), (v,)), others=Others(asked, lse, delta)),
        out_like=[q],
        scratch=[(steps.size, q.dtype)],
        products=3,
        interpret=interpret,
        name="flash_attention_dq",
    )
    return dq


def keys_and_values(options: maths.Options, q, k, v, do, lse, delta, asked, states, *, interpret):
    """The gradients of k and v."""
    size = k.shape[-1] + v.shape[-1]

    def sums(*wanted):
        steps = tile_sizes.steps(size, size, scores=len(wanted), most=_MOST)
        return calls.call(
            functools.partial(_keys_and_values, options, wanted),
            walks.walk(states, over="column", tile=TILE, step=steps.size),
            steps,
            Inputs(kept=(k, v), fetched=((q, lse), (do, delta)), others=Others(asked)),
            out_like=[(k, v)[i] for i in wanted],
            scratch=[(steps.size, q.dtype) for _ in wanted],
            products=2 * len(wanted),
            interpret=interpret,
            name="flash_attention_d" + "".join("kv"[i] for i in wanted),
        )

    return sums(0, 1) if size <= _BOTH else (*sums(0), *sums(1))


def _queries(options, work: Work, dq_ref):
    (q, do), others = (work.kept(0), work.kept(1)), work.inputs.others
    lse, delta = (maths.rows(x, work.b, work.head, work.begin) for x in (others.lse, others.delta))

    def with_sum(total):
        def add(carry, step, partial):
            (k,) = step.ready(0)
            bent, y = maths.scores(options, maths.product(q, k.T))
            if partial:
                y = maths.masked(options, others.asked, work, step, "row", y)
            weights = jnp.exp2(y - maths.along(lse, y.shape, 0))
            (v,) = step.ready(1)
            dweights = maths.product(do, v.T) - maths.along(delta, y.shape, 0)
            _add_product(total, work.scratch(0), maths.bend(bent, weights * dweights), k)
            plgpu.wgmma_wait(0)
            return carry

        work.each(add, ())
        return total[...]

    dq = pl.run_scoped(with_sum, plgpu.ACC((ROWS, q.shape[1]), jnp.float32))
    q[...] = (dq * options.scale).astype(q.dtype)
    work.write((q, dq_ref))


def _keys_and_values(options, wanted, work: Work, *outputs):
    k, v = work.kept(0), work.kept(1)
    scratch = {x: work.scratch(i) for i, x in enumerate(wanted)}

    def with_sums(*totals):
        totals = dict(zip(wanted, totals, strict=True))

        def add(carry, step, partial):
            q, lse = step.ready(0)
            bent, y = maths.scores(options, maths.product(k, q.T))
            if partial:
                y = maths.masked(options, work.inputs.others.asked, work, step, "column", y)
            weights = jnp.exp2(y - maths.along(maths.columns(lse), y.shape, 1))
            do, delta = step.ready(1)
            if 1 in wanted:
                _add_product(totals[1], scratch[1], weights, do)
            if 0 in wanted:
                delta = maths.along(maths.columns(delta), y.shape, 1)
                dy = weights * (maths.product(v, do.T) - delta)
                _add_product(totals[0], scratch[0], maths.bend(bent, dy), q)
            plgpu.wgmma_wait(0)
            return carry

        work.each(add, ())
        return [total[...] for total in totals.values()]

    sums = [plgpu.ACC((ROWS, (k, v)[i].shape[1]), jnp.float32) for i in wanted]
    for i, x in zip(wanted, pl.run_scoped(with_sums, *sums), strict=True):
        staged, scale = ((k, options.scale), (v, 1))[i]
        staged[...] = (x * scale).astype(staged.dtype)
    work.write(*zip(((k, v)[i] for i in wanted), outputs, strict=True))


def _add_product(total, scratch, a, b):
    """Begins `total += a b`, for which a goes to shared memory."""
    scratch[...] = a.astype(scratch.dtype)
    plgpu.commit_smem()
    plgpu.wgmma(total, scratch, b)
