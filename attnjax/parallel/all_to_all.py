"""Ulysses: sequences are exchanged for heads, so that a device has some heads of all tokens.

Any mechanism whose heads don't know of each other, with any mask and option, is called as it is;
the output is exchanged back. Source: Jacobs et al., "DeepSpeed Ulysses", arXiv:2309.14509,
section 3. The heads of queries must divide by the devices; key heads that don't are repeated.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnjax.parallel import indices, layout, losses, split


def _check(record, call, places):
    split.heads(record, call, places.here("N"), places.size, by="all_to_all")


def _run(record, call, places):
    heads = Heads.of(places, places.size)
    here, letters = heads.enter(call), call.letters["return"]
    lengths = {letter: places.sizes[letter] for letter in split.SEQUENCES if letter in places.sizes}
    arrays = {name: _cut(x, call.letters[name], lengths) for name, x in here.arrays.items()}
    out = split.apply(record.fn, here._replace(arrays=arrays))
    o, *state = out if isinstance(out, tuple) else (out,)
    widths = [(0, places.length("T") - lengths["T"] if a == "T" else 0) for a in letters]
    o = heads.leave(jnp.pad(o, widths), letters)
    return (o, heads.join(*state, call.letters["initial_state"].index("N"))) if state else o


def _cut(x, letters, lengths):
    """Without what fills up, which only the last device has."""
    for axis, letter in enumerate(letters):
        if letter in lengths and x.shape[axis] > lengths[letter]:
            x = lax.slice_in_dim(x, 0, lengths[letter], axis=axis)
    return x


class Heads(NamedTuple):
    """Runs of `devices` neighbours along a mesh axis, each run with a part of the sequence."""

    axis: str
    devices: int
    repeat: int  # of each key head
    here: int  # query heads of a device after the exchange

    @classmethod
    def of(cls, places: layout.Places, devices: int) -> "Heads":
        """Of as many devices."""
        N, grouped = places.here("N"), places.sizes.get("K", 1) > 1
        repeat = layout.repeats(N, places.here("K"), devices) if grouped and not N % devices else 1
        return cls(places.axis, devices, repeat, N // devices)

    @property
    def _groups(self):
        size = lax.axis_size(self.axis)
        if self.devices == size:
            return None
        return [list(range(i, i + self.devices)) for i in range(0, size, self.devices)]

    @property
    def first(self) -> jax.Array:
        """The number, of those that this device had, of the first query head that stays."""
        return lax.axis_index(self.axis) % self.devices * self.here

    def enter(self, call: split.Call) -> split.Call:
        """A call on all tokens of a run of devices and a part of the heads."""
        arrays = {n: self._enter(x, call.letters[n]) for n, x in call.arrays.items()}
        by_head = lambda x: x.ndim > 2 and x.shape[1] > 1
        mask = jax.tree.map(lambda x: self._own(x, 1) if by_head(x) else x, call.mask)
        options = indices.shifted(call.options, head=self.first)
        options = losses.shared(options, 1 / self.devices)
        return call._replace(arrays=arrays, mask=mask, options=options)

    def _enter(self, x, letters):
        if "K" in letters and self.repeat > 1:
            x = jnp.repeat(x, self.repeat, letters.index("K"))
        axes = list(enumerate(letters))
        heads = [i for i, a in axes if a == "N" or (a == "K" and x.shape[i] > 1)]
        tokens = [i for i, a in axes if a in split.SEQUENCES]
        options = dict(tiled=True, axis_index_groups=self._groups)
        if heads and tokens:
            return lax.all_to_all(x, self.axis, heads[0], tokens[0], **options)
        if tokens:
            return lax.all_gather(x, self.axis, axis=tokens[0], **options)
        return self._own(x, heads[0]) if heads else x

    def _own(self, x, axis):
        """The part of an axis of heads that belongs to this device."""
        size = x.shape[axis] // self.devices
        first = lax.axis_index(self.axis) % self.devices * size
        return lax.dynamic_slice_in_dim(x, first, size, axis)

    def leave(self, o: jax.Array, letters: tuple[str, ...]) -> jax.Array:
        """An output on its own tokens again, with all heads."""
        axes = letters.index("T"), letters.index("N")
        options = dict(tiled=True, axis_index_groups=self._groups)
        return lax.all_to_all(o, self.axis, *axes, **options)

    def join(self, state: jax.Array, axis: int) -> jax.Array:
        """A state of all heads, known to be the same in each device, from states of some."""
        shape = list(state.shape)
        shape[axis] *= self.devices
        whole, first = jnp.zeros_like(state, shape=shape), self.first
        return lax.psum(lax.dynamic_update_slice_in_dim(whole, state, first, axis), self.axis)


STRATEGY = split.Strategy(check=_check, run=_run)
