"""A part of a sequence for each device, all of one length, put together from what it is sent."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Slab(NamedTuple):
    """Positions start[d] ... start[d] + length - 1 for device d, of which need[d] are filled in.

    The others are zero: nothing looks at them.
    """

    start: np.ndarray  # (P)
    length: int
    need: np.ndarray  # (P 2): first and end

    @classmethod
    def of(cls, need: np.ndarray, total: int, *, align: int = 1, least: int = 1) -> "Slab":
        """Slabs of at least `least` of `total` positions that hold what each device needs.

        They begin at multiples of `align`, and end at one or at the end of all: so whatever is cut
        into runs of `align` positions is cut alike in the slab.
        """
        low = need[:, 0] // align * align
        high = np.minimum(-(-need[:, 1] // align) * align, total)
        length = max(int((high - low).max()), min(least, total), 1)
        length = min(length + (total - length) % align, total)
        return cls(np.minimum(low, total - length), length, need)

    def first(self, mesh_axis: str) -> jax.Array:
        """The position at which the slab of this device begins."""
        return jnp.asarray(self.start)[lax.axis_index(mesh_axis)]

    def fetch(self, x: jax.Array, axis: int, mesh_axis: str) -> jax.Array:
        """The slab of this device along an axis of x, of which each device has its piece."""
        shape = list(x.shape)
        shape[axis] = self.length
        out, here = jnp.zeros_like(x, shape=shape), lax.axis_index(mesh_axis)
        for (offset, low, high), devices in self.messages(x.shape[axis]).items():
            part = lax.slice_in_dim(x, low, high, axis=axis)
            if offset:
                part = lax.ppermute(part, mesh_axis, [(d + offset, d) for d in devices])
            gets, at = np.zeros(len(self.start), bool), np.zeros(len(self.start), int)
            gets[devices] = True
            at[devices] = [(d + offset) * x.shape[axis] + low - self.start[d] for d in devices]
            at = jnp.asarray(at)[here]
            old = lax.dynamic_slice_in_dim(out, at, high - low, axis)
            new = jnp.where(jnp.asarray(gets)[here], part, old)
            out = lax.dynamic_update_slice_in_dim(out, new, at, axis)
        return out

    def messages(self, piece: int) -> dict[tuple[int, int, int], list[int]]:
        """(offset, low, high) -> the devices d that need those rows of the piece of d + offset."""
        found = {}
        for d, (first, end) in enumerate(self.need):
            for source in range(first // piece, -(-end // piece)):
                low, high = max(first - source * piece, 0), min(end - source * piece, piece)
                if low < high:
                    found.setdefault((source - d, int(low), int(high)), []).append(d)
        return found
