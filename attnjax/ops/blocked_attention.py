"""Exact softmax attention tile by tile: O(T) memory forward and backward, empty tiles skipped.

The forward pass is the online softmax over key tiles; it keeps the output and lse, from which the
backward pass computes each tile's weights again. Source: Milakov and Gimelshein, "Online
normalizer calculation for softmax"; Dao, "FlashAttention-2", algorithms 1 and 2.

Unlike there: one loop over query tiles in both passes, with only the tiles that the mask needs.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.core import masks
from attnjax.ops import blocked_arguments, blocked_gradients, blocked_schedule, blocked_tile
from attnjax.ops.blocked_arguments import zeros
from attnjax.ops.blocked_tile import LOG2E
from pallas_kernels import tables
from pallas_kernels.flash_attention.whole import part_of


def blocked_attention(
    q, k, v, t, s, *, mask, bias, scale, softcap, sinks, dropout, score_mod, whole=None
):
    """(output, lse) as `ops.dot_product_attention` defines them; reverse mode only.

    t (T) and s (S) are the positions of queries and keys. `whole`: see `ops.part_of_attention`.
    """
    score_mod, captured, constants = blocked_arguments.open_closure(score_mod)
    learned = blocked_arguments.Learned(q, k, v, bias, sinks, captured)
    options = dict(scale=scale, softcap=softcap, score_mod=score_mod)
    options |= dict(mask=mask, dropout=dropout, constants=constants)
    options, learned, given = arguments(learned, t, s, **options)
    leaves, tree = jax.tree.flatten(given)
    learned = blocked_arguments.varying(learned, like=(learned, leaves, whole))
    if whole is not None:
        return _attend_to_part(options, tree, learned, leaves, whole)
    return _attend(options, tree, learned, leaves)


def arguments(learned, t, s, *, mask, dropout, constants, scale, softcap, score_mod):
    """(Options, Learned, Given) of `blocked_arguments`; score_mod is what `open_closure` gave."""
    N, (S, K) = learned.q.shape[2], learned.k.shape[1:3]
    plan = blocked_schedule.schedule(mask, t, s, K=K, G=N // K, tile=_tile(learned))
    rows = jnp.asarray(masks.tile_positions(t, plan.block_q), jnp.int32)
    columns = jnp.asarray(masks.tile_positions(s, plan.block_k), jnp.int32)
    exists = np.arange(columns.size).reshape(columns.shape) < S
    dtype = jnp.result_type(learned.q, learned.k)
    # scaling queries is cheaper than scaling scores, but rounds them where they are narrow
    scales = (scale * LOG2E, 1.0) if dtype == jnp.float32 else (1.0, scale * LOG2E)
    options = blocked_arguments.Options(*scales, softcap, score_mod)
    learned = learned._replace(q=learned.q.astype(dtype), k=learned.k.astype(dtype))
    given = blocked_arguments.Given(rows, columns, exists, mask, dropout, constants, plan)
    return options, learned, given


def _tile(learned):
    """Queries and keys of a tile, if the table of the device at hand says it."""
    q, k, v = learned[:3]
    case = dict(dtype=q.dtype, head_dim=max(q.shape[-1], v.shape[-1]))
    case |= dict(length=math.sqrt(q.shape[1] * k.shape[1]), implementation="blocked")
    return tables.here().tile("block", None, "dot_product_attention", **case)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(options, tree, learned, leaves):
    given = tree.unflatten(leaves)
    plan, T = given.schedule, learned.q.shape[1]
    q, k, v, bias = plan.cut(options.q_scale, *learned[:4])
    learned = learned._replace(bias=bias)

    def chunk(x):
        unit, q, k, v = x

        def row(x):
            i, q, order = x

            def step(j, carry, partial):
                at = dict(partial=partial, transposed=False)
                tile = blocked_tile.place(given, options, unit, i, j, **at)
                return blocked_tile.attend(tile, carry, q, k[j], v[j], learned)

            o, peak, total = plan.over_keys(order, step, _start(plan, learned, unit, like=q))
            o = o / jnp.where(total > 0, total, 1.0)[..., None]
            return o.astype(v.dtype), (peak + jnp.log2(total)) / LOG2E

        return lax.map(row, (np.arange(len(q)), q, plan.rows(unit)))

    o, lse = lax.map(chunk, (np.arange(len(q)), q, k, v))
    return plan.join(o, T), plan.join(lse[..., None], T)[..., 0]


def _start(plan, learned, unit, like):
    """(o, peak, total) of no key: or of the sink, which has a logit and no value."""
    shape = like.shape[:-1]
    o, total = zeros((*shape, learned.v.shape[-1]), like), zeros(shape, like)
    if learned.sinks is None:
        return o, total - jnp.inf, total
    sinks = plan.of_chunk(learned.sinks.astype(jnp.float32) * LOG2E, unit)
    return o, total + sinks[..., None], total + 1.0


def _forward(options, tree, learned, leaves):
    o, lse = _attend(options, tree, learned, leaves)
    return (o, lse), (learned, leaves, o, lse)


def _backward(options, tree, residuals, cotangents):
    learned, leaves, o, lse = residuals
    return gradients(options, learned, tree.unflatten(leaves), o, lse, *cotangents), None


def gradients(options, learned, given, o, lse, do, dlse):
    """Gradients of all that is learned, in its dtypes, by those of the output and lse."""
    empty = lse == -jnp.inf  # sees nothing: its weights and gradients must be 0, not NaN
    lse = jnp.where(empty, jnp.inf, lse)
    delta = jnp.sum(do.astype(jnp.float32) * o, -1) - dlse
    delta = jnp.where(empty, 0.0, delta)
    dsinks = None
    if learned.sinks is not None:
        dsinks = -jnp.sum(jnp.exp(learned.sinks[None, None] - lse) * delta, (0, 1))
    grads = blocked_gradients.gradients(options, learned, given, do, lse, delta)
    grads = grads._replace(sinks=dsinks)
    return jax.tree.map(lambda g, x: g.astype(x.dtype), grads, learned)


_attend.defvjp(_forward, _backward)
_attend_to_part = part_of(_backward, static=2)
