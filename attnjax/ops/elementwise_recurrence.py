r"""Recurrences of vectors, each entry by itself, under masks.

    h_t = a_t h_{t-1} + x_t                        h_{-1} = initial_state, h_{T-1} is returned

Two steps are one of the same kind, (a, x) and then (b, y) being (b a, b x + y), so a prefix scan
takes the tokens of a chunk at once; chunks follow each other, and backward keeps only what goes
from one to the next. Source: Blelloch, "Prefix Sums and Their Applications", section 1.4.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from attnjax.core import masks
from attnjax.ops import state_masks


def elementwise_recurrence(
    a: Inexact[Array, "B T N H"],
    x: Inexact[Array, "B T N H"],
    *,
    mask: masks.Mask | None = None,
    initial_state: Inexact[Array, "B N H"] | None = None,
    chunk: int = 128,
    by: str = "elementwise_recurrence",
) -> tuple[Inexact[Array, "B T N H"], Inexact[Array, "B N H"]]:
    """(h at every token, the last h), in complex64 where an argument is complex, else in float32.

    Args:
      a: factors, of |a| <= 1 lest h grow without bound.
      mask: any of Causal (which holds anyway), Valid, and Segments of which each is one run of
        tokens. A token that is not valid changes nothing. The initial state belongs to the first
        segment, the last h to the last.
      chunk: tokens taken at once.
      by: who asks, for error messages.

    O(T) time and memory. Raises NotImplementedError for any other mask, ValueError for shapes that
    don't fit.
    """
    if a.shape != x.shape or x.shape[1] == 0 or chunk < 1:
        raise ValueError(f"a {a.shape} and x {x.shape} must be alike, not empty, and {chunk=} >= 1")
    _, valid, segments = masks.select(mask, masks.Causal, masks.Valid, masks.Segments, by=by)
    a, x = _masked(a, x, valid, state_masks.documents(segments, by))
    given = [a, x] if initial_state is None else [a, x, initial_state]
    dtype = jnp.result_type(jnp.float32, *given)
    state = jnp.zeros_like(x[:, 0], dtype)  # varies on a mesh as x does
    if initial_state is not None:
        state = state + initial_state
    T = x.shape[1]
    cut = functools.partial(_cut, size=min(chunk, T))
    state, h = jax.lax.scan(_steps, state, (cut(a.astype(dtype), fill=1), cut(x.astype(dtype))))
    return jnp.moveaxis(h, 0, 1).reshape(x.shape[0], -1, *x.shape[2:])[:, :T], state


def carry(
    a: Inexact[Array, "B T N H"], *, mask: masks.Mask | None = None
) -> Inexact[Array, "B N H"]:
    """What an initial state is multiplied by over all tokens: 0 where another segment begins."""
    options = dict(mask=mask, initial_state=jnp.ones_like(a[:, 0]), by="carry")
    _, factor = elementwise_recurrence(a, jnp.zeros_like(a), **options)
    return factor


@jax.checkpoint
def _steps(state, chunk):
    def then(first, second):
        (a, x), (b, y) = first, second
        return b * a, b * x + y

    a, h = jax.lax.associative_scan(then, chunk, axis=1)
    h = h + a * state[:, None]
    return h[:, -1], h


def _masked(a, x, valid, documents):
    """(a, x), but (1, 0) at padding, and a = 0 where a document begins that is not the first."""
    for part in valid:
        seen = part.keys[:, :, None, None]
        a, x = jnp.where(seen, a, 1), jnp.where(seen, x, 0)
    if documents is not None:
        new = jnp.diff(documents, axis=1, prepend=documents[:, :1]) != 0
        a = jnp.where(new[:, :, None, None], 0, a)
    return a, x


def _cut(x, size, fill=0):
    """(B T N H) -> (chunks B size N H), the end filled up."""
    B, T, *rest = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % size), (0, 0), (0, 0)), constant_values=fill)
    return jnp.moveaxis(x.reshape(B, -1, size, *rest), 1, 0)
