"""Documents packed into one sequence, as kernels want them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def starts(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Where the run of equal numbers that each token is in begins; -1 for the first run.

    What came before the sequence belongs to the first.
    """
    t = jnp.arange(1, segments.shape[1])
    new = jnp.where(segments[:, 1:] != segments[:, :-1], t[None], -1)
    return jax.lax.cummax(jnp.pad(new, ((0, 0), (1, 0)), constant_values=-1), axis=1)
