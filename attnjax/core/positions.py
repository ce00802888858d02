"""What a model is told of positions: rotations, biases of the scores, and tables to look up."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnjax.core import layers


def rotary(
    x: Float[Array, "B T N H"], positions: Int[Array, "T"], *, base: float = 10_000.0
) -> Float[Array, "B T N H"]:
    """Rotate pairs (i, i + H/2) of features by the angle position * base^(-2i/H).

    Source: Su et al., "RoFormer", eq. 34, with the pairing of halves instead of neighbours.
    Products of two rotated vectors depend on the difference of their positions alone. Raises
    ValueError for an odd H.
    """
    H = x.shape[-1]
    if H % 2:
        raise ValueError(f"{H=} must be even")
    angle = _angles(positions, H // 2, base)[None, :, None, :]
    return _rotate(x, angle)


def rotary_grid(
    x: Float[Array, "B T N H"], coordinates: Float[Array, "T A"], *, base: float = 100.0
) -> Float[Array, "B T N H"]:
    """Rotary form for A axes: each axis rotates H/A features by its coordinate.

    Coordinates may be real numbers (continuous positions). Raises ValueError where H is not a
    multiple of 2A. Source: Heo et al., "Rotary Position Embedding for Vision Transformer", the
    axial form.
    """
    H, A = x.shape[-1], coordinates.shape[-1]
    if H % (2 * A):
        raise ValueError(f"{H=} must be a multiple of twice the {A} axes")
    angles = [_angles(coordinates[:, a], H // (2 * A), base) for a in range(A)]
    return _rotate(x, jnp.concatenate(angles, -1)[None, :, None, :])


def _angles(positions, count, base):
    frequency = base ** -(np.arange(count, dtype=np.float32) / count)
    return positions.astype(jnp.float32)[:, None] * frequency[None, :]


def _rotate(x, angle):
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def alibi_slopes(num_heads: int) -> Float[np.ndarray, "N"]:
    """Slopes 2^(-8(n+1)/N) of head n.

    Source: Press et al., "Train Short, Test Long", section 3. For N that is no power of two the
    authors' code interleaves two sequences; here one geometric sequence serves every N.
    """
    return 2.0 ** (-8.0 * np.arange(1, num_heads + 1, dtype=np.float32) / num_heads)


def alibi(num_heads: int):
    """A score_mod that lowers a score by slope * (distance of query and key)."""
    slopes = jnp.asarray(alibi_slopes(num_heads))
    return lambda score, b, n, t, s: score - slopes[n] * jnp.abs(t - s)


def sinusoidal(length: int, features: int, *, base: float = 10_000.0) -> Float[Array, "T D"]:
    """Sine and cosine waves of Vaswani et al., section 3.5: first all sines, then all cosines."""
    angle = _angles(jnp.arange(length), -(-features // 2), base)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)[:, :features]


class RelativeBias(nn.Module):
    """A learned score bias by head and offset on a grid of 1 to 3 axes: (1 N T T).

    An axis of length L has 2L - 1 offsets; `table` is (N, product of the 2L - 1). Source: Liu et
    al., "Swin Transformer", eq. 4 and the text below it.
    """

    num_heads: int
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> Float[Array, "1 N T T"]:
        index = relative_index(self.shape)
        offsets = int(np.prod([2 * n - 1 for n in self.shape]))
        table = layers.Table((self.num_heads, offsets), name="relative")()
        return table[:, index][None]


def relative_index(shape: tuple[int, ...]) -> Int[np.ndarray, "T T"]:
    """The number of the offset between each two cells of a grid, in row order."""
    cells = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), -1)
    offset = cells[:, None] - cells[None, :] + np.asarray(shape)[None, None] - 1
    return np.ravel_multi_index(tuple(np.moveaxis(offset, -1, 0)), [2 * n - 1 for n in shape])


def grid_coordinates(shape: tuple[int, ...]) -> Int[np.ndarray, "T A"]:
    """Coordinates of the cells of a grid in row order."""
    return np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), -1)
