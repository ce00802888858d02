"""Vectors of length 1, as the delta rule needs of its keys so that its state stays bounded."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def unit(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """x / sqrt(x . x + 10^-6) over the last axis, in x's dtype, so that 0 stays 0."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt((y**2).sum(-1, keepdims=True) + 1e-6)).astype(x.dtype)
