"""The maths of one chunk of one head, shared by every implementation.

Matrices with two axes and products of them are all there is, which compile inside a kernel too.
Sums of decays are products with matrices of zeros and ones: each sum has its own terms alone, so no
exponent is the difference of two large ones, and none is positive.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_PART = 16  # rows of a triangular system that are solved at once

_times = functools.partial(jnp.matmul, precision="highest")


class Gates(NamedTuple):
    """What tokens of a chunk see of it and of the state, and what is left after it; float32."""

    log_decay: Any  # (C G)
    past: Any  # (C C), of booleans: what each token sees of the chunk
    seen: Any  # (C G), what is left of the state when a token sees it
    left: Any  # (C G), what is left of a token in the new state
    kept: Any  # (G 1), what is left of the state in the new one


def gates(log_decay, start) -> Gates:
    """Of C tokens, arguments as of `attend`."""
    C = len(start)
    t, s = rows_and_columns(C)
    last = start[-1:]  # (1 1): of the segment of the new state
    g = jnp.zeros((C, 1)) if log_decay is None else log_decay.astype(jnp.float32)
    return Gates(
        log_decay=g,
        past=(s <= t) & (s >= start),
        seen=jnp.where(start < 0, jnp.exp(_total(s <= t, g)), 0.0),
        left=jnp.where(t >= last, jnp.exp(_total(s > t, g)), 0.0),
        kept=jnp.where(last < 0, jnp.exp(_times(g.T, jnp.ones((C, 1)))), 0.0),
    )


def attend(state, q, k, v, log_decay, beta, start):
    """(new state, output) of C tokens in float32.

    Args:
      state: (H V), after the token before this chunk.
      q, k, v: (C H), (C H), (C V). Tokens that are zero, with decay 0, change nothing: padding.
      log_decay: (C 1), (C H) or None.
      beta: (C 1), or None for plain values.
      start: (C 1), where in this chunk each token's segment begins; negative is before it.
    """
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    gate = gates(log_decay, start)
    if beta is not None:
        beta = beta.astype(jnp.float32)
        v = beta * (v - (k * gate.seen) @ state)
        v = solve(beta * weights(k, k, gate), v)
    out = (q * gate.seen) @ state + weights(q, k, gate) @ v
    return gate.kept * state + (k * gate.left).T @ v, out


def gradients(state, tokens, start, dstate, do):
    """(of state, of tokens: q, k, v, log_decay, beta) by those of the new state and the output."""
    _, vjp = jax.vjp(lambda state, tokens: attend(state, *tokens, start), state, tokens)
    return vjp((dstate, do.astype(jnp.float32)))


def cut(x, C, mode="constant"):
    """(B T N F) -> (B N chunks C F), filled up by zeros or (mode="edge") by the last token."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % C), (0, 0), (0, 0)), mode)
    return x.reshape(x.shape[0], -1, C, *x.shape[2:]).transpose(0, 3, 1, 2, 4)


def join(x, T):
    """(B N chunks C F) -> (B T N F)"""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :T].swapaxes(1, 2)


def cut_starts(starts, C):
    """(B T), in the sequence -> (B 1 chunks C 1), in each chunk."""
    starts = cut(starts[:, :, None, None], C, mode="edge")
    return starts - C * jnp.arange(starts.shape[2])[None, None, :, None, None]


def solve(lower, v):
    """x of (I + lower) x = v; of lower (C C) only what is below its diagonal is read.

    Part after part of the rows: what is known is subtracted, and the part's own triangle inverted.
    Solvers of libraries are called once for each chunk and, on a busy CPU, wait for each other's
    threads; and inside a kernel there are none.
    """
    parts = []
    for i in range(0, len(v), _PART):
        rows = slice(i, i + _PART)
        rest = v[rows]
        if parts:
            rest = rest - _times(lower[rows, :i], jnp.concatenate(parts))
        parts.append(_times(_inverse(lower[rows, rows]), rest))
    return jnp.concatenate(parts)


def _inverse(lower):
    """Of I + lower, below the diagonal; by blocks of 1, 2, 4, ... rows, two at a time.

    [[A, 0], [B, D]] has the inverse [[A', 0], [-D' B A', D']]; inverses of all blocks of a size are
    the diagonal blocks of one matrix. Errors would grow with each level, so products are exact.
    """
    t, s = rows_and_columns(len(lower))
    inverse, n = jnp.where(t == s, 1.0, 0.0), 1
    while n < len(lower):
        below = jnp.where(_halves(t, s, n), lower, 0.0)
        inverse = inverse - _times(_times(inverse, below), inverse)
        n *= 2
    return inverse


def weights(q, k, gate: Gates):
    """sum_h q_th k_sh exp(g_(s+1)h + ... + g_th) of what each token sees, else 0: (C C).

    Decays by channel can't be taken out of the sum, but split: those up to a border between s and t
    go with the key, those after it with the query. Pairs of blocks of 1, 2, 4, ... tokens, with a
    border in the middle, have each s < t on the two sides of one.
    """
    C, g = len(q), gate.log_decay
    t, s = rows_and_columns(C)
    if g.shape[1] == 1:
        decay = _total(s <= t, jnp.where(t > s, g, 0.0))
        return jnp.where(gate.past, (q @ k.T) * jnp.exp(decay), 0.0)
    total, n = jnp.where(t == s, (q * k).sum(1, keepdims=True), 0.0), 1
    while n < C:
        border = (t & -2 * n) + n
        between = ((s >= border) & (s <= t)) | ((s > t) & (s < border))
        decay = jnp.exp(_total(between, g))
        total += jnp.where(_halves(t, s, n), (q * decay) @ (k * decay).T, 0.0)
        n *= 2
    return jnp.where(gate.past, total, 0.0)


def _halves(t, s, n):
    """Where t is in the second and s in the first block of a pair of blocks of n, a power of 2."""
    return ((t & -2 * n) == (s & -2 * n)) & ((t & n) > (s & n))


def _total(terms, x):
    """Sums of the rows of x that are terms (C C) of each."""
    return _times(terms.astype(jnp.float32), x)


def rows_and_columns(C):
    """Numbers of rows (C 1) and of columns (1 C)."""
    iota = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (C, 1) if axis == 0 else (1, C), axis)
    return iota(0), iota(1)
