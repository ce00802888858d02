"""The backward kernels: each tile's weights again from lse, and sums over rows or columns.

    dz_ts = p_ts (drop(do_t . v_s) - delta_t),    dy = score_mod'(y) dz
    dx_ts = scale (1 - (x_ts / softcap)^2) dy_ts
    dq_t = sum_s dx_ts k_s,    dk_s = sum_t dx_ts q_t,    dv_s = sum_t drop(p)_ts do_t

p = exp(z - lse), z = score_mod(y), delta = do . o - dlse. Each sum is made by one warpgroup, in a
fixed order, so results are the same each time. Source: Dao, "FlashAttention-2", algorithm 2; Shah
et al., "FlashAttention-3", appendix B.

Unlike there: a kernel for each of (dq) and (dk, dv), so that none needs atomic additions; and where
heads are too wide for the registers of both, one for each of dk and dv.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.mosaic_gpu import call as calls
from pallas_kernels.flash_attention.mosaic_gpu import gradients
from pallas_kernels.flash_attention.mosaic_gpu import part as parts
from pallas_kernels.flash_attention.mosaic_gpu import tile as maths
from pallas_kernels.flash_attention.mosaic_gpu.frame import Frame
from pallas_kernels.flash_attention.mosaic_gpu.part import Part
from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import ROWS, TILE
from pallas_kernels.flash_attention.mosaic_gpu.work import Inputs, Work

_BOTH = 256  # features of dk and dv that they hold at once


def queries(
    options: maths.Options, q, k, v, do, lse, delta, asked, walk, *, bias=(), interpret
) -> jax.Array:
    """The gradient of q; lse in base 2, and inf for a query that sees nothing.

    walk and bias are as for `forward.attend`, with keys as rows for `keys_and_values`.
    """
    (B, T, N, _), S = q.shape, k.shape[1]
    dq = Part(jax.ShapeDtypeStruct(q.shape, q.dtype), (0,))
    [dq] = calls.call(
        functools.partial(_queries, options),
        functools.partial(Frame, "row", (B, N), (B, N), (T // TILE, S // TILE)),
        functools.partial(walk, over="row", tile=TILE),
        Inputs(
            kept=parts.along(0, q=q, do=do, lse=lse, delta=delta),
            fetched=(parts.along(1, k=k) | parts.summed(k=k) | dict(bias), parts.along(1, v=v)),
            others=asked,
        ),
        outputs=[dq],
        scratch={"scores": parts.scores(q.dtype)},
        most=gradients.columns(options, q.shape[-1]),
        products=3,
        interpret=interpret,
        name="flash_attention_dq",
    )
    return dq


def keys_and_values(
    options: maths.Options, q, k, v, do, lse, delta, asked, walk, *, bias=(), interpret
) -> tuple[jax.Array, ...]:
    """The gradients of k and v."""
    (B, T, N, _), (_, S, K, _) = q.shape, k.shape
    first = parts.along(1, q=q, lse=lse) | parts.summed(q=q) | dict(bias)
    second = parts.along(1, do=do, delta=delta) | parts.summed(do=do)
    like = {"k": k, "v": v}

    def sums(*wanted):
        grads = [jax.ShapeDtypeStruct(like[name].shape, like[name].dtype) for name in wanted]
        return calls.call(
            functools.partial(_keys_and_values, options, wanted),
            functools.partial(Frame, "column", (B, N), (B, K), (S // TILE, T // TILE)),
            functools.partial(walk, over="column", tile=TILE),
            Inputs(kept=parts.along(0, **like), fetched=(first, second), others=asked),
            outputs=[Part(x, (0,)) for x in grads],
            scratch={name: parts.scores(q.dtype) for name in wanted},
            most=gradients.columns(options, sum(x.shape[-1] for x in grads)),
            products=2 * len(wanted),
            interpret=interpret,
            name="flash_attention_d" + "".join(wanted),
        )

    width = k.shape[-1] + v.shape[-1]
    return sums("k", "v") if width <= _BOTH else (*sums("k"), *sums("v"))


def _queries(options, work: Work, dq):
    def with_sum(total):
        def add(carry, step, partial):
            tile = maths.Tile(options, work.inputs.others, step, partial=partial)
            found = step.ready(0)
            slopes, p = gradients.weights(tile, found)
            dz = gradients.dscores(tile, step.ready(1), p, tile.dropping(p.shape))
            dx = slopes.of_product(dz)
            _add_product(total, work.scratch("scores"), dx, parts.to_sum("k", found))
            plgpu.wgmma_wait(0)
            return carry

        work.each(add, ())
        return total[...]

    q = work.kept["q"]
    total = pl.run_scoped(with_sum, plgpu.ACC((ROWS, q.shape[1]), jnp.float32))
    q[...] = (total * options.scale).astype(q.dtype)
    work.write((q, dq))


def _keys_and_values(options, wanted, work: Work, *outputs):
    def with_sums(*totals):
        totals = dict(zip(wanted, totals, strict=True))

        def add(carry, step, partial):
            tile = maths.Tile(options, work.inputs.others, step, 1, partial)
            found = step.ready(0)
            slopes, p = gradients.weights(tile, found)
            drop, met = tile.dropping(p.shape), step.ready(1)
            if "v" in wanted:
                _add_product(totals["v"], work.scratch("v"), drop(p), parts.to_sum("do", met))
            if "k" in wanted:
                dx = slopes.of_product(gradients.dscores(tile, met, p, drop))
                _add_product(totals["k"], work.scratch("k"), dx, parts.to_sum("q", found))
            plgpu.wgmma_wait(0)
            return carry

        work.each(add, ())
        return [total[...] for total in totals.values()]

    kept = work.kept
    sums = [plgpu.ACC((ROWS, kept[name].shape[1]), jnp.float32) for name in wanted]
    for name, total in zip(wanted, pl.run_scoped(with_sums, *sums), strict=True):
        total = total * options.scale if name == "k" else total
        kept[name][...] = total.astype(kept[name].dtype)
    work.write(*zip((kept[name] for name in wanted), outputs, strict=True))


def _add_product(total, scratch, a, b):
    """Begins `total += a b`, for which a goes to shared memory."""
    scratch[...] = maths.factor(a, scratch.dtype)
    plgpu.commit_smem()
    plgpu.wgmma(total, scratch, b)
