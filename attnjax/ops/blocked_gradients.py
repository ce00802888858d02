"""The backward pass of blocked attention: the tiles of the forward pass, in the same order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.ops import blocked_tile
from attnjax.ops.blocked_arguments import Learned, zeros
from attnjax.ops.blocked_tile import LOG2E


def gradients(options, learned, given, do, lse, delta) -> Learned:
    """Gradients of all that is learned but the sinks.

    For each query, delta (B T N) is what all its scores' gradients have in common:
    do . o - dlse. A query without weights has lse = inf.
    """
    plan = given.schedule
    tiles, join = jax.vjp(functools.partial(plan.cut, options.q_scale), *learned[:4])
    rows = plan.cut_rows(do), plan.cut_rows(delta[..., None])[..., 0]
    # queries that only fill up the last tile have no weights either
    rows += (plan.cut_rows(lse[..., None] * LOG2E, fill=jnp.inf)[..., 0],)
    *grads, dcaptured = _over_chunks(options, learned._replace(bias=tiles[3]), given, tiles, rows)
    dq, dk, dv, dbias = join(jax.tree.map(lambda g, x: g.astype(x.dtype), tuple(grads), tiles))
    return Learned(dq, dk, dv, dbias, None, dcaptured)


def _over_chunks(options, learned, given, tiles, rows):
    """Gradients of the tiles and of captured arrays, in float32."""
    q, k, v, bias = tiles

    def chunk(shared, x):
        unit, q, k, v, *rest = x
        carry = zeros(k.shape, q), zeros(v.shape, q), *shared
        row = functools.partial(_row, options, learned, given, unit, k, v, k.mT)
        rows = np.arange(len(q)), q, *rest, given.schedule.rows(unit)
        (dk, dv, *shared), dq = lax.scan(row, carry, rows)
        return tuple(shared), (dq, dk, dv)

    shared = jax.tree.map(lambda x: zeros(x.shape, q), (bias, learned.captured))
    shared, (dq, dk, dv) = lax.scan(chunk, shared, (np.arange(len(q)), q, k, v, *rows))
    # tiles give gradients per unit of log 2
    dq, dk, dbias, dcaptured = jax.tree.map(lambda x: x / LOG2E, (dq, dk, *shared))
    return dq, dk, dv, dbias, dcaptured


def _row(options, learned, given, unit, k, v, keys, carry, x):
    """Add a query tile to the gradients in `carry`, and give that of its queries."""
    i, q, do, delta, lse, order = x

    def step(j, carry, partial):
        dq, dk, dv, dbias, dcaptured = carry
        at = dict(partial=partial, transposed=True)
        tile = blocked_tile.place(given, options, unit, i, j, **at)
        grads = blocked_tile.gradients(tile, q, k[j], v[j], keys[j], do, lse, delta, learned)
        dcaptured = jax.tree.map(jnp.add, dcaptured, grads[4])
        dk, dv = dk.at[j].add(grads[1]), dv.at[j].add(grads[2])
        return dq + grads[0], dk, dv, tile.add(dbias, grads[3]), dcaptured

    P, G, rows, H = q.shape
    carry = zeros((P, H, G * rows), q), *carry
    dq, *carry = given.schedule.over_keys(order, step, carry)
    return tuple(carry), dq.mT.reshape(q.shape)
