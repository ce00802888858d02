"""Devices in a ring, and the order in which their pieces hold the tokens of a sequence.

    16 tokens, 4 devices    contiguous      zigzag          striped
    device 0                0  1  2  3      0  1 14 15      0  4  8 12
    device 1                4  5  6  7      2  3 12 13      1  5  9 13
    device 2                8  9 10 11      4  5 10 11      2  6 10 14
    device 3               12 13 14 15      6  7  8  9      3  7 11 15

Under a causal mask the last contiguous pieces see the most; zigzag and striped ones see as much as
each other. Sources: Li et al., "DISTFLASHATTN"; Brandon et al., "Striped Attention",
arXiv:2311.09431, section 3; zigzag is known from Zhu's "ring-flash-attention".
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.core import masks

Order = Literal["contiguous", "zigzag", "striped"]


def check_order(order: str) -> None:
    """Raises ValueError for an unknown order."""
    if order not in get_args(Order):
        raise ValueError(f"{order=} must be one of {get_args(Order)}")


def multiple(order: str, size: int) -> int:
    """What must divide the length of a sequence that is laid over `size` devices."""
    check_order(order)
    return size * dict(contiguous=1, zigzag=2, striped=size)[order]


def positions(order: Order, index, size: int, length: int):
    """Positions of the `length` tokens in piece `index` of `size`; numpy where index is a number.

    With `index` (P 1) those of P pieces.
    """
    at = np.arange(length)
    if order == "contiguous":
        return index * length + at
    if order == "striped":
        return index + size * at
    half = length // 2
    module = jnp if isinstance(index, jax.Array) else np
    return module.where(at < half, index, 2 * size - 2 - index) * half + at


def needed(mask: masks.Mask | None, order: Order, size: int, T: int, S: int) -> tuple[int, ...]:
    """After how many rotations of keys some device may see one, as far as that is known here.

    T and S are the lengths of the pieces of `size` devices.
    """
    runs = 2 if order == "zigzag" else 1
    index = np.arange(size)[:, None]
    t, s = (positions(order, index, size, n).reshape(size * runs, -1) for n in (T, S))
    seen = np.full((size * runs,) * 2, True)
    for part in masks.parts(mask):
        if isinstance(part, (masks.Causal, masks.Window, masks.Prefix)):
            seen &= part.tiles(t, s)[0, 0] != masks.EMPTY
    seen = seen.reshape(size, runs, size, runs).any((1, 3))
    device = np.arange(size)
    visible = [i for i in device if seen[device, (device - i) % size].any()]
    return tuple(map(int, visible)) or (0,)


class Ring(NamedTuple):
    """The devices along a mesh axis whose indices are the same modulo `stride`."""

    axis: str
    stride: int = 1

    @property
    def size(self) -> int:
        """Devices in the ring."""
        return lax.axis_size(self.axis) // self.stride

    @property
    def here(self) -> jax.Array:
        """The number of this device in its ring."""
        return lax.axis_index(self.axis) // self.stride

    def rotate(self, arrays, by: int = 1):
        """A tree of arrays of the device `by` places before this one."""
        if by % self.size == 0:
            return arrays
        return self._send(arrays, [(i + by) % self.size for i in range(self.size)])

    def _send(self, arrays, to):
        """Each array of device i to device to[i]."""
        start = np.arange(self.size)[:, None] * self.stride + np.arange(self.stride)
        pairs = zip(start.ravel().tolist(), start[np.asarray(to)].ravel().tolist(), strict=True)
        return lax.ppermute(arrays, self.axis, list(pairs))

    def arrange(self, x: jax.Array, order: Order, axis: int) -> jax.Array:
        """A contiguous piece -> this device's piece in `order`, along an axis of x."""
        if order == "contiguous" or self.size == 1:
            return x
        if order == "striped":
            x = _split_axis(x, axis, self.size)
            return jnp.squeeze(self._exchange(x, axis + 1, axis), axis + 1)
        even, odd = (self._send(half, to) for half, to in self._halves(jnp.split(x, 2, axis)))
        low_is_even = self.here % 2 == 0
        low, high = jnp.where(low_is_even, even, odd), jnp.where(low_is_even, odd, even)
        return jnp.concatenate([low, high], axis)

    def restore(self, x: jax.Array, order: Order, axis: int) -> jax.Array:
        """The inverse of `arrange`."""
        if order == "contiguous" or self.size == 1:
            return x
        if order == "striped":
            x = self._exchange(jnp.expand_dims(x, axis + 1), axis, axis + 1)
            return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        low, high = jnp.split(x, 2, axis)
        low_is_even = self.here % 2 == 0
        halves = jnp.where(low_is_even, low, high), jnp.where(low_is_even, high, low)
        back = [self._send(half, np.argsort(to)) for half, to in self._halves(halves)]
        return jnp.concatenate(back, axis)

    def _halves(self, halves):
        """Each half with the device it goes to: half c of all goes to c, or 2 size - 1 - c."""
        for parity, half in enumerate(halves):
            number = 2 * np.arange(self.size) + parity
            yield half, np.minimum(number, 2 * self.size - 1 - number)

    def _exchange(self, x, split, concat):
        columns = range(self.stride)
        groups = [[i * self.stride + c for i in range(self.size)] for c in columns]
        options = dict(tiled=True, axis_index_groups=None if self.stride == 1 else groups)
        return lax.all_to_all(x, self.axis, split, concat, **options)


def _split_axis(x, axis, size):
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
