"""Exact softmax attention tile by tile: O(T) memory forward and backward, empty tiles skipped.

The forward pass is the online softmax over key tiles; it keeps the output and lse, from which the
backward pass computes each tile's weights again. Source: Milakov and Gimelshein, "Online
normalizer calculation for softmax"; Dao, "FlashAttention-2", algorithms 1 and 2.

Unlike there: one loop over query tiles in both passes, with only the tiles that the mask needs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.core import masks
from attnjax.core.masks import Mask
from attnjax.ops import blocked_schedule, blocked_tile
from attnjax.ops.blocked_tile import LOG2E
from attnjax.ops.dropout import Dropout


class Learned(NamedTuple):
    """What has gradients."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    sinks: jax.Array | None
    captured: list  # by score_mod: the floating-point arrays


class Given(NamedTuple):
    """What has none."""

    t: jax.Array  # (tq block) positions of queries
    s: jax.Array  # (tk block) positions of keys
    exists: np.ndarray  # (tk block) False for padding
    mask: Mask | None
    dropout: Dropout | None
    constants: list  # captured by score_mod: the other arrays
    schedule: blocked_schedule.Schedule


def blocked_attention(q, k, v, t, s, *, mask, bias, scale, softcap, sinks, dropout, score_mod):
    """(output, lse) as `ops.dot_product_attention` defines them; no forward-mode derivative.

    t (T) and s (S) are the positions of queries and keys.
    """
    K, S = k.shape[2], k.shape[1]
    plan = blocked_schedule.schedule(mask, t, s, K=K, G=q.shape[2] // K)
    rows = jnp.asarray(masks.tile_positions(t, plan.block_q), jnp.int32)
    columns = jnp.asarray(masks.tile_positions(s, plan.block_k), jnp.int32)
    exists = np.arange(columns.size).reshape(columns.shape) < S
    score_mod, captured, constants = _open(score_mod)
    learned = Learned(q, k, v, bias, sinks, captured)
    given = Given(rows, columns, exists, mask, dropout, constants, plan)
    options = blocked_tile.Options(scale * LOG2E, softcap, score_mod)
    if q.dtype == jnp.float32:  # cheaper here than over all scores; in bfloat16 it would round
        learned = learned._replace(q=q * options.scale)
        options = options._replace(scale=1)
    leaves, tree = jax.tree.flatten(given)
    return _attend(options, tree, _varying(learned, like=(learned, leaves)), leaves)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(options, tree, learned, leaves):
    given = tree.unflatten(leaves)
    plan, T = given.schedule, learned.q.shape[1]
    q, k, v, bias = _cut(plan, *learned[:4])

    def chunk(x):
        unit, q, k, v = x

        def row(x):
            i, q, order = x

            def step(j, carry, partial):
                at = _place(given, unit, i, j, transposed=False)
                extra = at.part(bias), learned.captured, given, at, options, partial
                return blocked_tile.attend(carry, q, k[j], v[j], *extra)

            o, peak, total = _over_keys(plan, order, step, _start(plan, learned, unit, like=q))
            o = o / jnp.where(total > 0, total, 1.0)[..., None]
            return o.astype(v.dtype), (peak + jnp.log2(total))[..., None] / LOG2E

        return lax.map(row, (np.arange(len(q)), q, plan.rows(unit)))

    o, lse = lax.map(chunk, (np.arange(len(q)), q, k, v))
    return plan.join(o, T), plan.join(lse, T)[..., 0]


def _forward(options, tree, learned, leaves):
    o, lse = _attend(options, tree, learned, leaves)
    return (o, lse), (learned, leaves, o, lse)


def _backward(options, tree, residuals, cotangents):
    learned, leaves, o, lse = residuals
    given, (do, dlse) = tree.unflatten(leaves), cotangents
    empty = lse == -jnp.inf  # sees nothing: its weights and gradients must be 0, not NaN
    lse = jnp.where(empty, jnp.inf, lse)
    delta = jnp.sum(do * o, -1, dtype=jnp.float32) - dlse
    delta = jnp.where(empty, 0.0, delta)
    cut, join = jax.vjp(functools.partial(_cut, given.schedule), *learned[:4])
    *grads, dcaptured = _gradients(options, cut, learned.captured, given, do, lse, delta)
    dq, dk, dv, dbias = join(jax.tree.map(lambda g, x: g.astype(x.dtype), tuple(grads), cut))
    dcaptured = [g.astype(x.dtype) for g, x in zip(dcaptured, learned.captured, strict=True)]
    dsinks = None
    if learned.sinks is not None:
        share = jnp.exp(learned.sinks[None, None] - lse)
        dsinks = -jnp.sum(share * delta, (0, 1)).astype(learned.sinks.dtype)
    return Learned(dq, dk, dv, dbias, dsinks, dcaptured), None


_attend.defvjp(_forward, _backward)


def _gradients(options, cut, captured, given, do, lse, delta):
    """Gradients of the pieces in `cut` and of the captured arrays, in float32."""
    (q, k, v, bias), plan = cut, given.schedule
    do, delta = plan.cut(do, plan.block_q), plan.cut(delta[..., None], plan.block_q)[..., 0]
    # queries that only fill up the last tile have no weights either
    lse = plan.cut(lse[..., None] * LOG2E, plan.block_q, fill=jnp.inf)[..., 0]

    def chunk(shared, x):
        unit, q, k, v, *rest = x
        keys = k.mT

        def row(carry, x):
            i, q, do, lse, delta, order = x

            def step(j, carry, partial):
                dq, dk, dv, dbias, dcaptured = carry
                at = _place(given, unit, i, j, transposed=True)
                grads = blocked_tile.gradients(
                    q, k[j], v[j], keys[j], do, lse, delta, at.part(bias), captured, given, at,
                    options, partial,
                )  # fmt: skip
                dcaptured = jax.tree.map(jnp.add, dcaptured, grads[4])
                dbias = at.add(dbias, grads[3])
                return dq + grads[0], _add(dk, j, grads[1]), _add(dv, j, grads[2]), dbias, dcaptured

            P, G, rows, H = q.shape
            dq, *carry = _over_keys(plan, order, step, (_zeros((P, H, G * rows), like=q), *carry))
            return carry, dq.mT.reshape(q.shape)

        carry = [_zeros(k.shape, like=q), _zeros(v.shape, like=q), *shared]
        (dk, dv, *shared), dq = lax.scan(row, carry, (np.arange(len(q)), q, *rest, plan.rows(unit)))
        return shared, (dq, dk, dv)

    shared = [jax.tree.map(lambda x: _zeros(x.shape, like=q), x) for x in (bias, captured)]
    units = np.arange(len(q)), q, k, v, do, lse, delta
    shared, (dq, dk, dv) = lax.scan(chunk, shared, units)
    dq, dk, dbias, dcaptured = jax.tree.map(lambda x: x / LOG2E, (dq, dk, *shared))
    return dq, dk, dv, dbias, dcaptured


def _over_keys(plan, order, step, carry):
    """`step(key tile, carry, partial)` over the tiles that a query tile needs."""
    tiles, full, some = order
    for kind in plan.kinds:
        first, end = (0, full) if kind == masks.FULL else (full, some)
        body = lambda x, carry, partial=kind == masks.PARTIAL: step(tiles[x], carry, partial)
        carry = lax.fori_loop(first, end, body, carry)
    return carry


def _start(plan, learned, unit, like):
    """(o, peak, total) of no key: or of the sink, which has a logit and no value."""
    shape, V = like.shape[:-1], learned.v.shape[-1]
    o, total = _zeros((*shape, V), like=like), _zeros(shape, like=like)
    if learned.sinks is None:
        return o, total - jnp.inf, total
    sinks = plan.chunk(learned.sinks.astype(jnp.float32) * LOG2E, unit)
    return o, total + sinks[..., None], total + 1.0


def _cut(plan, q, k, v, bias):
    q, k, v = plan.cut(q, plan.block_q), plan.cut(k, plan.block_k), plan.cut(v, plan.block_k)
    if bias is not None:
        for axis, block in ((2, plan.block_q), (3, plan.block_k)):
            bias = blocked_schedule.pad(bias, axis, block) if bias.shape[axis] > 1 else bias
    return q, k[:, :, :, 0], v[:, :, :, 0], bias


def _place(given, unit, i, j, transposed):
    plan = given.schedule
    C, P, G = plan.heads
    b, n = unit // C, unit % C * P * G
    return blocked_tile.Place(
        b=jnp.reshape(b, 1),
        n=n + jnp.arange(P * G),
        t=given.t[i],
        s=given.s[j],
        start=(b, n, i * plan.block_q, j * plan.block_k),
        exists=jnp.asarray(given.exists)[j],
        heads=(P, G),
        transposed=transposed,
    )


def _open(score_mod):
    """score_mod with what it captured as arguments: (function, floating arrays, other arrays)."""
    if score_mod is None:
        return None, [], []
    scalars = [jax.ShapeDtypeStruct((), x) for x in (jnp.float32, *[jnp.int32] * 4)]
    closed = jax.make_jaxpr(score_mod)(*scalars)
    learned = [jnp.issubdtype(x.dtype, jnp.floating) for x in closed.consts]

    def opened(captured, constants, *scalars):
        captured, constants = iter(captured), iter(constants)
        values = [next(captured if x else constants) for x in learned]
        return jax.core.eval_jaxpr(closed.jaxpr, values, *scalars)[0]

    pick = lambda kind: [x for x, y in zip(closed.consts, learned, strict=True) if y == kind]
    return opened, pick(True), pick(False)


def _add(x, j, part):
    return x.at[j].add(part)


def _zeros(shape, like):
    return jnp.zeros_like(like, jnp.float32, shape)  # varies over mesh axes as `like` does


def _varying(x, like):
    """x, said to vary over each mesh axis that anything in `like` varies over.

    shard_map checks that what a loop carries has one type; gradients are summed where this casts.
    """
    varies = lambda leaf: jax.typeof(leaf).mat.varying
    axes = frozenset().union(*map(varies, jax.tree.leaves(like)))
    cast = lambda leaf: lax.pcast(leaf, tuple(axes - varies(leaf)), to="varying")
    return jax.tree.map(cast, x)
