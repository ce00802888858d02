"""Arrays over the score matrix, as a warpgroup reads its part of a tile from global memory."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes", "boolean"]
)
@dataclasses.dataclass(frozen=True)
class Sheet:
    """An array with an entry for each row (#B #N R), for each column (#B #N C), both or neither.

    axes are those of a tile that it has; rows are what a block of threads keeps.
    """

    array: Any  # or the reference to it
    axes: tuple[int, ...]
    boolean: bool

    def read(self, b, n, begin: tuple, shape: tuple[int, int]) -> jax.Array:
        """Its part of a tile that begins at (row, column), over the whole of it."""
        whole = [i if n > 1 else 0 for i, n in zip((b, n), self.array.shape[:2], strict=True)]
        x = self._load(whole, begin, shape) if self.axes else self.array[*whole]
        if len(self.axes) < 2:
            x = lax.broadcast_in_dim(x, shape, self.axes)
        return x.astype(jnp.int32) != 0 if self.boolean else x

    def _load(self, whole, begin, shape):
        part = self.array.at[*whole, *(pl.ds(begin[i], shape[i]) for i in self.axes)]
        layout = plgpu.Layout.WGMMA
        if len(self.axes) == 1:
            layout = layout.reduce(1 - self.axes[0])
        return plgpu.load(part, layout=layout, optimized=False)


def lay(x: jax.Array | np.ndarray, sizes: tuple[int, int], over: str) -> Sheet:
    """An array (#B #N #T #S), padded to `sizes` queries and keys; over is "row" or "column"."""
    wide = [i for i in (2, 3) if x.shape[i] > 1] or [2]  # what is of neither is of each query
    boolean = x.dtype == bool
    x = jnp.asarray(x, _dtype(x.dtype, len(wide) > 1))
    for axis in wide:
        size = sizes[axis - 2]
        x = jnp.repeat(x, size, axis) if x.shape[axis] == 1 else pad(x, axis, size)
    if over == "column":
        x, wide = x.swapaxes(2, 3), [5 - i for i in wide]
    x = x.reshape(*x.shape[:2], *(x.shape[i] for i in sorted(wide)))
    return Sheet(x, tuple(i - 2 for i in sorted(wide)), boolean)


def of_heads(x: jax.Array) -> Sheet:
    """An array (#B #N 1 1), in its own dtype."""
    boolean = x.dtype == bool
    return Sheet(x[:, :, 0, 0].astype(jnp.int32 if boolean else x.dtype), (), boolean)


def _dtype(dtype, of_scores):
    """What an array is held as: small, if of each score."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return jnp.int8 if of_scores else jnp.int32
    if jnp.issubdtype(dtype, jnp.floating):
        return dtype if of_scores and dtype.itemsize == 2 else jnp.float32
    return jnp.int32


def pad(x: jax.Array, axis: int, size: int, fill: float | int = 0) -> jax.Array:
    """x with an axis filled up to `size`."""
    widths = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=fill)
