"""A scan over chunks, batched over sequences and heads; any platform, any way to differentiate."""

import jax
import jax.numpy as jnp

from pallas_kernels.linear_recurrence import chunk as chunks


def forward(tokens, state, starts, *, chunk, keep=True):
    """(o, final state, and with `keep` the states before each chunk).

    Where JAX differentiates it, it keeps those states and computes all else again.
    """
    q, _, v, *_ = tokens
    tokens, starts = _cut(tokens, starts, chunk)

    @jax.checkpoint
    def body(state, x):
        tokens, start = x
        after, o = chunks.attend(state, *tokens, start)
        return after, (o.astype(v.dtype), *[state] * keep)

    head = lambda state, tokens, starts: jax.lax.scan(body, state, (tokens, starts))
    state, (o, *states) = _heads(head)(state, tokens, starts)
    return chunks.join(o, q.shape[1]), state, *states


def backward(tokens, starts, states, do, dstate, *, chunk):
    """Gradients of (tokens, initial state) by those of the output and the final state."""
    T = do.shape[1]
    tokens, starts = _cut(tokens, starts, chunk)

    def body(dstate, x):
        (tokens, do, state), start = x
        return chunks.gradients(state, tokens, start, dstate, do)

    head = lambda dstate, x, starts: jax.lax.scan(body, dstate, (x, starts), reverse=True)
    x = tokens, chunks.cut(do, tokens[0].shape[3]), states
    dstate, gradients = _heads(head)(dstate, x, starts)
    return jax.tree.map(lambda x: chunks.join(x, T), gradients), dstate


def _heads(fn):
    """fn over sequences and heads; its third argument is the same for all heads."""
    return jax.vmap(jax.vmap(fn, in_axes=(0, 0, None)))


def _cut(tokens, starts, chunk):
    B, T = tokens[0].shape[:2]
    C = min(chunk, -(-T // 16) * 16) if T > 1 else 1
    if starts is None:
        starts = jnp.full((B, T), -1)
    return jax.tree.map(lambda x: chunks.cut(x, C), tokens), chunks.cut_starts(starts, C)[:, 0]
