"""A scan over chunks, batched over sequences and heads; any platform."""

import jax
import jax.numpy as jnp

from pallas_kernels.linear_recurrence import chunk as chunks


def linear_recurrence(q, k, v, log_decay, beta, state, starts, *, chunk):
    """(o, final state) of arguments that were checked and broadcast.

    Backward keeps the states between chunks, and computes all else again.
    """
    T = q.shape[1]
    C = min(chunk, -(-T // 16) * 16) if T > 1 else 1
    if starts is None:
        starts = jnp.full(q.shape[:2], -1)
    beta = None if beta is None else beta[..., None]
    tokens = [None if x is None else _cut(x, C) for x in (q, k, v, log_decay, beta)]
    starts = _cut(starts[:, :, None, None], C, mode="edge")[:, 0]  # (B chunks C 1)
    starts = starts - C * jnp.arange(starts.shape[1])[None, :, None, None]

    @jax.checkpoint
    def body(state, x):
        state, o = chunks.attend(state, *x)
        return state, o.astype(v.dtype)

    head = lambda state, tokens, starts: jax.lax.scan(body, state, (*tokens, starts))
    heads = jax.vmap(head, in_axes=(0, 0, None))
    state, o = jax.vmap(heads)(state, tokens, starts)  # o: (B N chunks C V)
    return o.reshape(*o.shape[:2], -1, o.shape[-1])[:, :, :T].swapaxes(1, 2), state


def _cut(x, C, mode="constant"):
    """(B T N F) -> (B N chunks C F), the last chunk padded."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % C), (0, 0), (0, 0)), mode)
    return x.reshape(x.shape[0], -1, C, *x.shape[2:]).transpose(0, 3, 1, 2, 4)
