r"""Forward-mode derivatives of softmax attention, from its output and lse, in O(T) memory.

    dlse_t = sum_s p_ts dy_ts + p_t dsink
    do_t   = sum_s drop(p_ts) (dy_ts v_s + dv_s) - dlse_t o_t

with scores y, weights p = exp(y - lse) and the weight p_t = exp(sink - lse_t) of a sink: over the
tiles of the forward pass, in the same order.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.ops import blocked_tile, linear_function
from attnjax.ops.blocked_arguments import Learned, zeros
from attnjax.ops.blocked_tile import LOG2E


def tangents(options, learned: Learned, given, o, lse, moved: Learned):
    """(do, dlse) by the tangents of all that is learned, of which None is zero."""
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # sees nothing: weights of 0, not NaN
    out, dlse = _over_chunks(options, learned, given, lse, moved)
    if moved.sinks is not None:
        share = jnp.exp(learned.sinks.astype(jnp.float32)[None, None] - lse)
        dlse = dlse + share * moved.sinks.astype(jnp.float32)[None, None]
    return (out - dlse[..., None] * o).astype(o.dtype), dlse


def _over_chunks(options, learned, given, lse, moved):
    """(sum_s drop(p_ts) (dy_ts v_s + dv_s), sum_s p_ts dy_ts) in float32."""
    plan, T = given.schedule, learned.q.shape[1]
    cut = functools.partial(plan.cut, options.q_scale)
    (*tiles, bias), changes = linear_function.push(cut, learned[:4], moved[:4])
    *changes, dbias = (y if x is not None else None for x, y in zip(moved, changes, strict=False))
    learned, moved = learned._replace(bias=bias), moved._replace(bias=dbias)

    def chunk(x):
        unit, (q, *kv), (dq, *dkv), lse = x

        def row(x):
            i, q, dq, lse, order = x

            def step(j, carry, partial):
                at = dict(partial=partial, transposed=False)
                tile = blocked_tile.place(given, options, unit, i, j, **at)
                here = jax.tree.map(lambda x: x[j], (kv, dkv))
                arrays, changes = (q, *here[0]), (dq, *here[1])
                return blocked_tile.tangents(tile, carry, arrays, changes, lse, learned, moved)

            total = zeros(lse.shape, like=q)
            out = zeros((*lse.shape, learned.v.shape[-1]), like=q)
            return plan.over_keys(order, step, (out, total))

        return lax.map(row, (np.arange(len(q)), q, dq, lse, plan.rows(unit)))

    rows = plan.cut_rows(lse[..., None] * LOG2E, fill=jnp.inf)[..., 0]
    out, total = lax.map(chunk, (np.arange(len(rows)), tiles, changes, rows))
    return plan.join(out, T), plan.join(total[..., None], T)[..., 0]
