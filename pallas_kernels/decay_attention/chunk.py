"""The maths of one chunk of one head, shared by every implementation."""

import jax
import jax.numpy as jnp


def attend(state, q, k, v, start, log_decay, *, age, count):
    """(new state, output) of C tokens in float32.

    Args:
      state: (H V), after the token before this chunk, decayed for that token.
      q, k, v: (C H), (C H), (C V). Tokens after the first `count` are zero: padding.
      start: (C 1), where in this chunk each token's segment begins; negative is before it.
      log_decay: a scalar.
      age: 0 where the state is already decayed for the first token of this chunk, else 1.
      count: of tokens; the new state is decayed for the last of them.
    """
    C = q.shape[0]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    t = jax.lax.broadcasted_iota(jnp.int32, (C, 1), 0)
    s = jax.lax.broadcasted_iota(jnp.int32, (1, C), 1)
    last = start[-1:]  # (1 1): where the segment begins that the new state is of
    within = jnp.where((s <= t) & (s >= start), _decay(log_decay, t - s), 0.0)
    seen = jnp.where(start < 0, _decay(log_decay, t + age), 0.0)
    left = jnp.where(t >= last, _decay(log_decay, count - 1 - t), 0.0)
    kept = jnp.where(last < 0, _decay(log_decay, age + count - 1), 0.0)
    out = ((q @ k.T) * within) @ v + (q * seen) @ state
    return kept * state + (k * left).T @ v, out


def _decay(log_decay, steps):
    """exp(log_decay * steps), and 1 for a negative number of steps: never more than 1."""
    return jnp.exp(log_decay * jnp.maximum(steps, 0).astype(jnp.float32))


def pad(x, multiple, *, mode="constant"):
    """x (... T F) with T filled up to a multiple, by zeros or (mode="edge") by the last token."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % multiple), (0, 0)], mode)
