"""All of a chunk that needs no state of another: XLA computes it, for many chunks at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_recurrence import chunk as chunks

_AT_ONCE = 4096  # chunks, whose intermediate results lie in memory beside one another


class Pieces(NamedTuple):
    """What a chunk does to a state S before it: u of its values, o put out, the state after it.

    u = v + read S,    o = q S + weights u,    S' = kept S + k^T u
    """

    q: Any  # (C H)
    k: Any  # (C H)
    v: Any  # (C V)
    read: Any  # (C H), or None without beta
    weights: Any  # (C C)
    kept: Any  # (G 1)


def pieces(q, k, v, log_decay, beta, start) -> Pieces:
    """Those of one chunk in float32; arguments as of `chunk.attend`.

    The delta rule's system has H columns more than there, for what is read of a state to come.
    """
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    gate, read = chunks.gates(log_decay, start), None
    if beta is not None:
        beta = beta.astype(jnp.float32)
        both = beta * jnp.concatenate([v, -k * gate.seen], 1)
        both = chunks.solve(beta * chunks.weights(k, k, gate), both)
        v, read = both[:, : v.shape[1]], both[:, v.shape[1] :]
    weights = chunks.weights(q, k, gate)
    return Pieces(q * gate.seen, k * gate.left, v, read, weights, gate.kept)


def gradients(tokens, start, state, after, du, do):
    """Of the tokens of one chunk, in their dtypes.

    Args:
      state: S (H V), before the chunk.
      after, du, do: cotangents of S' (H V), of u (C V) and of o (C V), in the dtype of products.
    """
    x, pull = jax.vjp(lambda tokens: pieces(*tokens, start), tokens)
    u, read = x.v, None
    if x.read is not None:
        u, read = u + _product(x.read, state, do.dtype), _product(du, state.T, do.dtype)
    cotangents = Pieces(
        q=_product(do, state.T, do.dtype),
        k=_product(u, after.T, do.dtype),
        v=du.astype(jnp.float32),
        read=read,
        weights=_product(do, u.T, do.dtype),
        kept=_like(x.kept, (state * after).sum(1, keepdims=True)),
    )
    return pull(cotangents)[0]


def each(fn: Callable, *trees):
    """fn of each chunk, of trees whose arrays have an axis of chunks before all others."""
    return jax.lax.map(lambda x: fn(*x), trees, batch_size=_AT_ONCE)


def _product(a, b, dtype):
    return jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _like(kept, by_channel):
    """(H 1) summed to (1 1) where a head has one decay."""
    return by_channel if len(kept) > 1 else by_channel.sum(0, keepdims=True)
