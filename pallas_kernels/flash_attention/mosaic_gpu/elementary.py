"""Functions of tiles, by those that Mosaic lowers for Hopper to instructions that are fine enough.

Errors are some of float32's beside 1, or beside the result if that is larger; those of powers grow
with the result's logarithm.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

_LOG2E = math.log2(math.e)
_TURN = 2 * math.pi
_SHORT_TURN = 6.28125  # of 8 bits: float32 holds its product with as many as 65536 exactly


def tanh(x: jax.Array) -> jax.Array:
    """tanh(x): the hardware's own has 11 bits."""
    return 1 - 2 / (1 + lax.exp2(x * (2 * _LOG2E)))


def sin(x: jax.Array) -> jax.Array:
    """sin(x): the hardware's own is exact within a turn only."""
    return lax.sin(_within_a_turn(x))


def cos(x: jax.Array) -> jax.Array:
    """cos(x): the hardware's own is exact within a turn only."""
    return lax.cos(_within_a_turn(x))


def log1p(x: jax.Array) -> jax.Array:
    """log(1 + x)."""
    return lax.log(1 + x)


def floor(x: jax.Array) -> jax.Array:
    """The whole number below x."""
    near = _nearest(x)
    return lax.select(near > x, near - 1, near)


def ceil(x: jax.Array) -> jax.Array:
    """The whole number above x."""
    return -floor(-x)


def power(x: jax.Array, y: jax.Array) -> jax.Array:
    """x to the y-th, which is floating or whole; NaN for x < 0 unless y is whole."""
    y = lax.convert_element_type(y, x.dtype)
    size, rounded = lax.exp(y * lax.log(lax.abs(x))), _nearest(y)
    odd = 2 * _nearest(y / 2) != y
    negative = lax.select(odd, -size, size)
    negative = lax.select(rounded == y, negative, lax.full_like(x, math.nan))
    found = lax.select(x < 0, negative, size)
    return lax.select(y == 0, lax.full_like(x, 1), found)


def integer_pow(x: jax.Array, y: int) -> jax.Array:
    """x to the y-th, which is known while tracing."""
    if y < 0:
        return 1 / integer_pow(x, -y)
    return lax.integer_pow(x, y)


def invert(x: jax.Array) -> jax.Array:
    """The other of two truth values; for integers, all bits."""
    return lax.bitwise_xor(x, lax.full_like(x, True)) if x.dtype == bool else lax.bitwise_not(x)


def convert(x: jax.Array, new_dtype) -> jax.Array:
    """x in another dtype."""
    return x != 0 if new_dtype == jnp.bool_ else lax.convert_element_type(x, new_dtype)


def _within_a_turn(x):
    turns = _nearest(x / _TURN)
    return (x - turns * _SHORT_TURN) - turns * (_TURN - _SHORT_TURN)


def _nearest(x):
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
