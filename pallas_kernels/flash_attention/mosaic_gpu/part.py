"""What goes through shared memory: of each array, what a tile of scores needs of it."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import GROUPS, ROWS


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes", "across"]
)
@dataclasses.dataclass(frozen=True)
class Part:
    """An array, its shape and dtype or the reference to it, and which part of it a tile needs.

    Arrays are (B L heads F); (B heads F L) where across; (B heads L), of a number for each; and
    (#B #N R C), of a number for each score. axes are those of a tile that they have: rows (0), of
    which each warpgroup has its own, and columns (1).
    """

    array: Any
    axes: tuple[int, ...]
    across: bool = False

    def shape(self, size: int) -> tuple[int, ...]:
        """Its shape in shared memory, where a step has `size` columns."""
        if len(self.axes) == 2:
            return GROUPS, ROWS, size
        if self.across:
            return self.array.shape[2], size
        rows = (GROUPS, ROWS) if self.axes == (0,) else (size,)
        return *rows, *self.array.shape[3:]

    def bytes(self, size: int) -> int:
        """What it takes of shared memory."""
        return math.prod(self.shape(size)) * self.array.dtype.itemsize

    def memory(self, size: int, *lead: int):
        """The type of shared memory for it, as often as `lead` says."""
        shape, dtype = (*lead, *self.shape(size)), self.array.dtype
        if self.array.ndim == 3:
            return plgpu.SMEM(shape, dtype)
        # both matrices of a product must be laid out alike, and one is as wide as a step
        swizzle = min(128, size * dtype.itemsize)
        tiling = plgpu.TilingTransform((8, swizzle // dtype.itemsize))
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))

    def of(self, place, size: int, group=0):
        """The reference to what a warpgroup needs of it for the step at a place."""
        row, column = pl.ds(place.row + group * ROWS, ROWS), lambda: pl.ds(place.column(), size)
        along = row if 0 in self.axes else column()
        heads_first = len(self.axes) == 2 or self.across or len(self.array.shape) == 3
        lengths = self.array.shape[0], self.array.shape[1 if heads_first else 2]
        b, head = (_shared(*x) for x in zip(place[:2], place.counts, lengths, strict=True))
        if not heads_first:
            return self.array.at[b, along, head]
        if len(self.axes) == 2:
            return self.array.at[b, head, row, column()]
        return self.array.at[b, head, :, along] if self.across else self.array.at[b, head, along]

    @property
    def is_factor(self) -> bool:
        """Whether it is (B L heads F)."""
        return self.array.ndim == 4 and len(self.axes) == 1 and not self.across

    @property
    def copies(self) -> int:
        """How many copies `fetch` makes."""
        return GROUPS if 0 in self.axes else 1

    def fetch(self, place, size: int, memory, arrived):
        """Copies what all warpgroups need of it, which a barrier tells."""
        if 0 not in self.axes:
            plgpu.copy_gmem_to_smem(self.of(place, size), memory, arrived)
            return
        for group in range(GROUPS):
            plgpu.copy_gmem_to_smem(self.of(place, size, group), memory.at[group], arrived)


def scores(dtype) -> Part:
    """A number for each score of a tile, of no array."""
    return Part(jax.ShapeDtypeStruct((1, 1, 1, 1), dtype), (0, 1))


def factor(x: jax.Array) -> jax.Array:
    """As products have it: float32 rounded to TF32, of which wgmma would cut off the rest."""
    narrow = x.dtype != jnp.float32 or x.ndim != 4
    return x if narrow else lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)


def along(axis: int, **arrays: jax.Array) -> dict[str, Part]:
    """Parts by their names, of factors (B L heads F) or numbers (B heads L) of rows or columns."""
    return {name: Part(factor(x), (axis,)) for name, x in arrays.items()}


def summed(**arrays: jax.Array) -> dict[str, Part]:
    """Columns (B L heads F) once more, if a product can't sum over them as they lie.

    wgmma wants float32 along the sum, and so across.
    """
    across = {name: factor(x) for name, x in arrays.items() if x.dtype == jnp.float32}
    return {_name(name): Part(x.transpose(0, 2, 3, 1), (1,), True) for name, x in across.items()}


def to_sum(name: str, found: dict):
    """Of what is ready, the form of columns that a product sums over."""
    return found[_name(name)] if _name(name) in found else found[name]


def _name(name):
    return f"{name} across"


def _shared(i, count, length):
    """The index for the i-th of `count`, in an axis that several share."""
    return i if length == count else lax.div(i, count // length)
