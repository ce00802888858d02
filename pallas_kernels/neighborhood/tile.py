"""The maths of one pack of groups and one head: keys in sublanes, all queries in lanes."""

import jax
import jax.numpy as jnp
from jax import lax


def weights(q, ks, seen, bias, *, T, scale):
    """Softmax over the keys: (S, lanes), 0 where nothing is seen.

    Args:
      q: (lanes H), T queries of each group.
      ks: (S H) of each group.
      seen: (S, lanes) or None.
      bias: (S, lanes) or None.
    """
    x = select([product(k, q, 1, 1) for k in ks], T) * scale
    if bias is not None:
        x = x + bias
    if seen is not None:
        x = jnp.where(seen, x, -jnp.inf)
    peak = x.max(0, keepdims=True)
    if seen is not None:
        peak = jnp.where(peak == -jnp.inf, 0.0, peak)  # -inf - -inf is NaN
    w = jnp.exp(x - peak)
    total = w.sum(0, keepdims=True)
    return w / (total if seen is None else jnp.where(total > 0, total, 1.0))


def output(w, vs, *, T):
    """(V, lanes) of weights (S, lanes) and values (S V) of each group."""
    return select([product(v, w, 0, 0) for v in vs], T)


def gradients(q, ks, vs, w, do, *, T, scale):
    """(dx before the scale (S, lanes), dq (H, lanes), dk and dv (H S), (V S) of each group)."""
    dw = select([product(v, do, 1, 1) for v in vs], T)
    dx = w * (dw - (w * dw).sum(0, keepdims=True))
    dq = select([product(k, dx * scale, 0, 0) for k in ks], T)
    own = lambda x, g: only(x, g, T) if len(ks) > 1 else x
    dks = [product(q, own(dx * scale, g), 0, 1) for g in range(len(ks))]
    dvs = [product(do, own(w, g), 0, 1) for g in range(len(ks))]
    return dx, dq, dks, dvs


def sees(ats, ends, *, T):
    """(S, lanes) from positions (A S) of each group's keys, and rows (2A lanes): low, then high."""
    A = len(ends) // 2
    columns = [at.T for at in ats]
    seen = True
    for a in range(A):
        at = select([x[:, a : a + 1] for x in columns], T, lanes=ends.shape[1])
        seen &= (ends[a : a + 1] <= at) & (at <= ends[A + a : A + a + 1])
    return seen


def select(parts, T, lanes=None):
    """Of each group's part (..., lanes) the lanes of its own T queries."""
    x = parts[0]
    for g, part in enumerate(parts[1:], 1):
        x = jnp.where(_lane(lanes or x.shape[1]) >= g * T, part, x)
    return x


def only(x, g, T):
    """x, and 0 in the lanes of other groups than g."""
    lane = _lane(x.shape[1])
    return jnp.where((lane >= g * T) & (lane < (g + 1) * T), x, 0.0)


def _lane(count):
    return lax.broadcasted_iota(jnp.int32, (1, count), 1)


def product(a, b, axis_a, axis_b):
    """Contracts an axis of each in float32; float32 weights meet narrower values in their dtype."""
    dtype = min(a.dtype, b.dtype, key=lambda x: x.itemsize)
    dimensions = ((axis_a,), (axis_b,)), ((), ())
    a, b = a.astype(dtype), b.astype(dtype)
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
