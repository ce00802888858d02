"""A scan over chunks, within which a prefix scan takes all tokens at once; any platform."""

import functools

import jax
import jax.numpy as jnp


def selective_scan(x, delta, rate, b, c, new, state, *, chunk):
    """(h_t . c_t in float32, final state) of arguments that were checked.

    Backward keeps the states between chunks, and computes all else again.
    """
    T, rate = x.shape[1], rate.astype(jnp.float32)[None, None]
    tokens = [_cut(array, min(chunk, T)) for array in (x, delta, b, c, new)]
    state, y = jax.lax.scan(functools.partial(_steps, rate), state, tokens)
    return jnp.moveaxis(y, 0, 1).reshape(x.shape[0], -1, *x.shape[2:])[:, :T], state


@jax.checkpoint
def _steps(rate, state, tokens):
    """(new state, output) of the C tokens of a chunk; those that are zero change nothing."""
    *arrays, new = tokens
    x, delta, b, c = (array.astype(jnp.float32) for array in arrays)
    decay = jnp.exp(delta[..., None] * rate)
    decay = jnp.where(new[:, :, None, None, None], 0.0, decay)
    added = (delta * x)[..., None] * b[..., None, :]

    def then(first, second):
        (f, h), (g, i) = first, second
        return g * f, g * h + i

    decay, h = jax.lax.associative_scan(then, (decay, added), axis=1)  # (B C N H M)
    h = h + decay * state[:, None]
    return h[:, -1], jnp.einsum("BCNHM,BCNM->BCNH", h, c)


def _cut(x, size):
    """(B T ...) -> (chunks B size ...), the end filled up with zeros."""
    B, T, *rest = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % size), *((0, 0) for _ in rest)))
    return jnp.moveaxis(x.reshape(B, -1, size, *rest), 1, 0)
