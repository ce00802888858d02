"""Arrays over the score matrix, as tiles read them: bias, masks, positions, sums of each query.

A tile of scores lies as (keys, queries): what belongs to a query is then a row of lanes, which is
reduced over sublanes and takes no more memory than it has entries.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["wide", "boolean"]
)
@dataclasses.dataclass(frozen=True)
class Sheet:
    """An array (#B #N #T #S), laid out; or its block spec; or the reference to its part of a tile.

    wide says for each axis whether it has an entry for every index. The layout is (#B #N S T), or
    one row (#B #N 1 T or S) without one of the last axes.
    """

    array: Any
    wide: tuple[bool, bool, bool, bool]
    boolean: bool = False

    def part(self, block_q: int, block_k: int) -> tuple[int, int]:
        """The shape of its part of a tile, where it lies."""
        *_, by_query, by_key = self.wide
        if by_query:
            return (block_k if by_key else 1), block_q
        return 1, (block_k if by_key else 1)

    def block(self, place) -> tuple:
        """Which block of the layout is its part of the tile at a place."""
        *whole, by_query, by_key = self.wide
        b, n = (i if wide else 0 for i, wide in zip((place.b, place.n), whole, strict=True))
        if by_query:
            return b, n, place.column if by_key else 0, place.row
        return b, n, 0, place.column if by_key else 0

    def read(self, shape: tuple[int, int]) -> jax.Array:
        """The part that the reference holds, over a tile of `shape` (keys, queries)."""
        x = self.array[...]
        if self.wide[3] and not self.wide[2]:
            x = x.reshape(-1, 1)
        if self.boolean or jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(jnp.int32 if self.boolean else jnp.float32)
        x = jnp.broadcast_to(x, shape)  # before it becomes boolean: masks don't broadcast well
        return x != 0 if self.boolean else x

    def total(self, x: jax.Array) -> jax.Array:
        """A tile (keys, queries), summed over the axes that the sheet lacks, as its part lies."""
        *_, by_query, by_key = self.wide
        if not by_key:
            x = x.sum(0, keepdims=True)
        if not by_query:
            x = x.sum(1, keepdims=True)
            x = x.reshape(1, -1) if by_key else x
        return x


def lay(x: jax.Array | np.ndarray, block_q: int, block_k: int) -> Sheet:
    """An array (#B #N #T #S), padded to whole tiles."""
    wide = tuple(n > 1 for n in x.shape)
    boolean = x.dtype == bool
    if boolean:
        x = x.astype(jnp.int8 if wide[2] and wide[3] else jnp.int32)
    elif not (wide[2] and wide[3]) and jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.float32)
    for axis, block in ((2, block_q), (3, block_k)):
        x = pad(x, axis, block) if wide[axis] else x
    return Sheet(x.swapaxes(2, 3) if wide[2] else x, wide, boolean)


def by_query(x: jax.Array | np.ndarray, block_q: int, fill: float) -> Sheet:
    """An array (B T N), with `fill` for queries that only fill up the last tile."""
    x = pad(x.swapaxes(1, 2), 2, block_q, fill)[:, :, None]
    return Sheet(x, (True, True, True, False))


def pad(x: jax.Array | np.ndarray, axis: int, block: int, fill: float | int = 0) -> jax.Array:
    """x with an axis filled up to a multiple of `block`."""
    widths = [(0, -n % block if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=fill)


def unlay(x: jax.Array, wide: tuple[bool, ...], T: int, S: int) -> jax.Array:
    """The inverse of `lay`, for lengths T and S."""
    *_, by_query, by_key = wide
    x = x.swapaxes(2, 3) if by_query else x
    return x[:, :, : T if by_query else 1, : S if by_key else 1]
