"""What masks become where tokens are added up to a state: padding adds nothing, documents part."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnjax.core import masks


def only_valid(
    x: Float[Array, "B S N H"], valid: tuple[masks.Valid, ...]
) -> Float[Array, "B S N H"]:
    """What tokens add, keys or features or steps: zero where any of the masks says padding."""
    for part in valid:
        x = jnp.where(part.keys[:, :, None, None], x, 0)
    return x


def documents(segments: tuple[masks.Segments, ...], by: str) -> Int[Array, "B T"] | None:
    """A number for each run of tokens that no mask divides; None without masks.

    Raises NotImplementedError, naming who asks (`by`), for keys with numbers of their own.
    """
    if any(part.kv is not None for part in segments):
        raise NotImplementedError(f"{by} can't honour Segments with ids of their own for keys")
    changes = [jnp.diff(part.q, axis=1, prepend=part.q[:, :1]) != 0 for part in segments]
    return sum(jnp.cumsum(change, 1) for change in changes) if changes else None


def only_first(
    factor: Float[Array, "#B N G 1"], segments: tuple[masks.Segments, ...]
) -> Float[Array, "#B N G 1"]:
    """A factor of the initial state that is zero where a second segment begins."""
    for part in segments:
        factor = jnp.where((part.q == part.q[:, :1]).all(1)[:, None, None, None], factor, 0.0)
    return factor
