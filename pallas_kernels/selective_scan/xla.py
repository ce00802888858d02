"""A scan over chunks, whose tokens are taken all at once or, on a CPU, in turn; any platform."""

import functools

import jax
import jax.numpy as jnp


def forward(tokens, weights, state, new, *, chunk, keep=True):
    """(y, final state, and with `keep` the states (B N chunks M H) before each chunk).

    Where JAX differentiates it, it keeps those states and computes all else again.
    """
    x = tokens[0]
    steps = jax.checkpoint(functools.partial(_steps, weights))

    def body(state, now):
        after, y = steps(state, *now)
        return after, (y.astype(x.dtype), *[state.mT] * keep)

    state, (y, *states) = jax.lax.scan(body, state, _cut(tokens, new, chunk))
    return _join(y, x.shape[1]), state, *(jnp.moveaxis(h, 0, 2) for h in states)


def backward(tokens, weights, new, states, dy, dstate, *, chunk):
    """Gradients of (tokens, weights, initial state) by those of the output and the final state."""
    T, raised = dy.shape[1], jax.tree.map(lambda w: w.astype(jnp.float32), weights)

    def body(carry, now):
        (dstate, dweights), ((tokens, new), dy, state) = carry, now
        steps = lambda state, tokens, weights: _steps(weights, state, tokens, new)
        _, vjp = jax.vjp(steps, state.mT, tokens, raised)
        dstate, dtokens, more = vjp((dstate, dy.astype(jnp.float32)))
        return (dstate, jax.tree.map(jnp.add, dweights, more)), dtokens

    (cut, new), (dys, _) = _cut(tokens, new, chunk), _cut(dy, None, chunk)
    xs = (cut, new), dys, jnp.moveaxis(states, 2, 0)
    zero = jax.tree.map(jnp.zeros_like, raised)
    (dstate, dweights), dtokens = jax.lax.scan(body, (dstate, zero), xs, reverse=True)
    dweights = jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, weights)
    return jax.tree.map(lambda d: _join(d, T), dtokens), dweights, dstate


def _steps(weights, state, tokens, new):
    """(new state, y in float32) of the C tokens of a chunk; those that are zero change nothing."""
    rate, skip = (w.astype(jnp.float32)[None, None] for w in weights)
    x, delta, b, c = (array.astype(jnp.float32) for array in tokens)
    decay = jnp.exp(delta[..., None] * rate)
    if new is not None:
        decay = jnp.where(new[:, :, None, None, None], 0.0, decay)
    added = (delta * x)[..., None] * b[..., None, :]
    # gradients of 1024 tokens on two CPU cores: in turn takes half the time, and a tenth to compile
    h = jax.lax.platform_dependent(decay, added, state, cpu=in_turn, default=at_once)
    return h[:, -1], jnp.einsum("BCNHM,BCNM->BCNH", h, c) + skip * x


def at_once(decay, added, state):
    """h_t = decay_t h_{t-1} + added_t for tokens (B C N H M), of which all go in parallel."""

    def then(first, second):
        (f, h), (g, i) = first, second
        return g * f, g * h + i

    decay, h = jax.lax.associative_scan(then, (decay, added), axis=1)
    return h + decay * state[:, None]


def in_turn(decay, added, state):
    """As `at_once`, token by token."""

    def step(h, x):
        h = x[0] * h + x[1]
        return h, h

    in_time = jnp.moveaxis(decay, 1, 0), jnp.moveaxis(added, 1, 0)
    return jnp.moveaxis(jax.lax.scan(step, state, in_time)[1], 0, 1)


def _cut(tokens, new, chunk):
    """(B T ...) -> (chunks B C ...), of all that is there; the end filled up with zeros."""

    def cut(x):
        B, T, *rest = x.shape
        C = min(chunk, T)
        x = jnp.pad(x, ((0, 0), (0, -T % C), *((0, 0) for _ in rest)))
        return jnp.moveaxis(x.reshape(B, -1, C, *rest), 1, 0)

    return jax.tree.map(cut, (tokens, new))


def _join(x, T):
    """(chunks B C ...) -> (B T ...)"""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :T]
