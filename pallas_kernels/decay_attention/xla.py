"""A scan over chunks, batched over sequences and heads; any platform."""

import jax
import jax.numpy as jnp

from pallas_kernels.decay_attention import chunk as chunks


def decay_attention(q, k, v, state, starts, log_decay, *, chunk):
    """(o, final state); the state given is decayed for the first token."""
    T = q.shape[1]
    C = min(chunk, T)
    if starts is None:
        starts = jnp.full(q.shape[:2], -1)
    qkv = [chunks.pad(x.swapaxes(1, 2), C) for x in (q, k, v)]
    starts = chunks.pad(starts[..., None], C, mode="edge")
    cut = lambda x: x.reshape(-1, C, x.shape[-1])

    def head(q, k, v, state, starts, log_decay):
        def body(state, x):
            i, q, k, v, start = x
            at = dict(age=jnp.minimum(i, 1), count=jnp.minimum(T - i * C, C))
            state, o = chunks.attend(state, q, k, v, start - i * C, log_decay, **at)
            return state, o.astype(v.dtype)

        xs = jnp.arange(-(-T // C)), cut(q), cut(k), cut(v), cut(starts)
        state, o = jax.lax.scan(body, state, xs)
        return o.reshape(v.shape), state

    heads = jax.vmap(head, in_axes=(0, 0, 0, 0, None, 0))
    o, state = jax.vmap(heads, in_axes=(0, 0, 0, 0, 0, None))(*qkv, state, starts, log_decay)
    return o[:, :, :T].swapaxes(1, 2), state
