"""The maths of one chunk of one head, shared by every implementation."""

import functools

import jax.numpy as jnp

_PART = 16  # tokens among which decays by channel are taken pair by pair


def attend(state, q, k, v, log_decay, beta, start):
    """(new state, output) of C tokens in float32.

    Args:
      state: (H V), after the token before this chunk.
      q, k, v: (C H), (C H), (C V). Tokens that are zero, with decay 0, change nothing: padding.
      log_decay: (C 1), (C H) or None.
      beta: (C 1), or None for plain values.
      start: (C 1), where in this chunk each token's segment begins; negative is before it.
    """
    C = q.shape[0]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    t, s = jnp.arange(C)[:, None], jnp.arange(C)[None, :]
    past, last = (s <= t) & (s >= start), start[-1, 0]
    g = jnp.zeros((C, 1)) if log_decay is None else jnp.cumsum(log_decay.astype(jnp.float32), 0)
    seen = jnp.where(start < 0, jnp.exp(g), 0.0)  # what each token sees of the state
    if beta is not None:
        beta = beta.astype(jnp.float32)
        stored = _weights(k, k, g, past)
        v = beta * (v - (k * seen) @ state)
        v = solve(beta * stored, v)
    out = (q * seen) @ state + _weights(q, k, g, past) @ v
    left = jnp.where(t >= last, jnp.exp(g[-1:] - g), 0.0)
    kept = jnp.where(last < 0, jnp.exp(g[-1]), 0.0)
    return kept[:, None] * state + (k * left).T @ v, out


def solve(lower, v):
    """x of (I + lower) x = v; of lower (C C) only what is below its diagonal is read.

    Blocks of 1, 2, 4, ... rows are inverted, two at a time: [[A, 0], [B, D]] has the inverse
    [[A', 0], [-D' B A', D']]. Products of matrices alone are fast on any platform, where solvers of
    libraries are called once for each chunk and, on a busy CPU, wait for each other's threads.
    """
    C, n = len(lower), 1
    size = 1 << (C - 1).bit_length()
    lower, inverse = jnp.pad(lower, (0, size - C)), jnp.ones((size, 1, 1))
    times = functools.partial(jnp.matmul, precision="highest")  # errors would grow with each level
    while n < size:
        pairs = lower.reshape(size // (2 * n), 2 * n, size // (2 * n), 2 * n)
        below = jnp.einsum("PTPS->PTS", pairs)[:, n:, :n]
        first, second = inverse[::2], inverse[1::2]
        below = -times(times(second, below), first)
        inverse = jnp.block([[first, jnp.zeros_like(first)], [below, second]])
        n *= 2
    return times(inverse[0, :C, :C], v)


def _weights(q, k, g, visible):
    """sum_h q_th k_sh exp(g_th - g_sh) where visible, a subset of s <= t, else 0: (C C)."""
    if g.shape[1] == 1:
        return (q @ k.T) * jnp.exp(jnp.where(visible, g - g.T, -jnp.inf))
    return jnp.where(visible, _by_channel(q, k, g), 0.0)


def _by_channel(q, k, g):
    """The weights of the past under decays by channel, whose products only pairs of tokens have.

    exp(g_t - g_s) = exp(g_t - r) exp(r - g_s) splits it, with both exponents <= 0 only for an r
    between: for the queries of a part r is g before it, which serves all keys of earlier parts.
    """
    C, H = q.shape
    part = min(C, _PART)
    cut = lambda x: x.reshape(-1, part, H)
    r = jnp.concatenate([jnp.zeros((1, H)), g[part - 1 : -1 : part]])  # (parts H)
    earlier = jnp.arange(C)[None, :, None] < part * jnp.arange(len(r))[:, None, None]
    keys = k[None] * jnp.exp(jnp.where(earlier, r[:, None] - g[None], -jnp.inf))  # (parts C H)
    weights = (cut(q) * jnp.exp(cut(g) - r[:, None])) @ keys.mT  # (parts part C)
    past = jnp.tril(jnp.ones((part, part), bool))[..., None]
    decay = jnp.exp(jnp.where(past, cut(g)[:, :, None] - cut(g)[:, None], -jnp.inf))
    own = jnp.einsum("PTH,PSH,PTSH->PTS", cut(q), cut(k), decay)
    spread = jnp.eye(len(r))[:, None, :, None] * own[:, :, None]  # (parts part parts part)
    return (weights.reshape(spread.shape) + spread).reshape(C, C)
