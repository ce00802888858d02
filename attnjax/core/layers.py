"""Projections shared by every mechanism, so that parameter paths mean the same everywhere.

The last two parts of a parameter's path say what its axes are, and `core.sharding` reads them:
heads/kernel (D N H), merge/kernel (N H D), dense/kernel (D F), conv/kernel, norm/scale, table.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class HeadProjection(nn.Module):
    """(B ... D) -> (B ... N H); parameter `heads/kernel` (D N H)."""

    num_heads: int
    head_dim: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B N H"]:
        features = (self.num_heads, self.head_dim)
        return nn.DenseGeneral(features, use_bias=False, dtype=self.dtype, name="heads")(x)


class HeadKernel(nn.Module):
    """A projection (R N F) to heads as an array, for a function that applies it itself."""

    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self) -> Float[Array, "R N F"]:
        init = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        return self.param("kernel", init, self.shape)


class OutputProjection(nn.Module):
    """(B ... N H), D -> (B ... D); parameter `merge/kernel` (N H D)."""

    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B N H"], features: int) -> Float[Array, "*B D"]:
        return nn.DenseGeneral(features, (-2, -1), use_bias=False, dtype=self.dtype, name="merge")(
            x
        )


class Dense(nn.Module):
    """(B ... D) -> (B ... F); parameters `dense/kernel` (D F) and, if asked, `dense/bias`."""

    features: int
    use_bias: bool = True
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        return nn.Dense(self.features, use_bias=self.use_bias, dtype=self.dtype, name="dense")(x)


class Conv(nn.Module):
    """A convolution over the axes before the last, borders filled up with zeros.

    Parameters `conv/kernel` (kernel size, D, F) and, if asked, `conv/bias`.
    """

    features: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    use_bias: bool = True
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B *X D"]) -> Float[Array, "B *Z F"]:
        return nn.Conv(
            self.features,
            self.kernel_size,
            self.strides or 1,
            use_bias=self.use_bias,
            dtype=self.dtype,
            name="conv",
        )(x)


class Table(nn.Module):
    """A learned array that is looked up or used whole; parameter `table`, kept in every device."""

    shape: tuple[int, ...]
    initializer: Callable[..., jax.Array] = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self) -> Float[Array, "..."]:
        return self.param("table", self.initializer, self.shape)


class Attend(nn.Module):
    """The one place in which a module calls its pure function.

    It has no parameters. It exists so that the call has a path ("block_1/mixer/attend"), by which
    `core.edit` reads and rewrites queries, keys, logits and weights without touching a mechanism.
    """

    fn: Callable[..., Any]

    def __call__(self, *arrays, **options):
        """`fn(*arrays, **options)`."""
        return self.fn(*arrays, **options)
