"""How the arguments of a call lie on a mesh.

B lies over data and fsdp, T, S, X and I over the context axis, N and K over tensor; all other axes
are whole in each device, and so is S beside T: of a bias (B N T S) a device has the rows of its own
queries. Masks are split by batch (and by head, where they have one): positions stay global. A
strategy may say that other letters than those lie over the context axis.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.core import masks
from attnjax.parallel import split


class Places:
    """Where the axes of a call lie on a mesh.

    Attributes:
      axis: of the mesh, over which sequences lie, or what else a strategy says.
      size: devices along it.
      sizes: of the letters, before anything is filled up.
      heads: devices over which heads would lie, did they divide.
      repeat: of each key head, where there are fewer than devices.
    """

    def __init__(self, mesh, axis: str, call: split.Call, *, multiple: int = 1, over=split.TOKENS):
        self.axis, self.size = axis, mesh.shape[axis]
        self.sizes = split.sizes(call.letters, call.arrays)
        self._mesh, self._multiple = mesh, math.lcm(multiple, self.size)
        batch = tuple(name for name in ("data", "fsdp") if name in mesh.shape)
        self._axes = {letter: axis for letter in over if letter not in split.HEADS}
        self._axes |= {"B": batch} if self._divides("B", batch) else {}
        heads = dict.fromkeys(("tensor", axis) if over == split.HEADS else ("tensor",))
        heads = tuple(name for name in heads if name in mesh.shape)
        self.heads = math.prod(mesh.shape[name] for name in heads)
        self.repeat = 1
        if heads and self._divides("N", heads):
            self._axes |= dict.fromkeys(self._split_heads(), heads if heads[1:] else heads[0])

    def _split_heads(self):
        """The letters of heads that are split."""
        if self.sizes.get("K", 1) == 1:
            return ("N",)
        self.repeat = repeats(self.sizes["N"], self.sizes["K"], self.heads)
        return split.HEADS

    def _divides(self, letter, axes):
        extent = math.prod(self._mesh.shape[name] for name in axes)
        return self.sizes.get(letter, extent) % extent == 0

    def here(self, letter: str) -> int:
        """Entries of an axis in each device, once a call is filled up."""
        return self.length(letter) // self._extent(letter)

    def length(self, letter: str) -> int:
        """Entries of an axis once a call is filled up."""
        size = self.sizes[letter] * (self.repeat if letter == "K" else 1)
        return size + (-size % self._multiple if self._is_filled_up(letter) else 0)

    def _is_filled_up(self, letter):
        return letter in split.TOKENS and letter in self._axes

    def first(self, letter: str) -> jax.Array | int:
        """The number of the first entry of an axis that is in this device."""
        axes = self._axes.get(letter)
        return lax.axis_index(axes) * self.here(letter) if axes and letter in self.sizes else 0

    def share(self, *letters: str) -> float:
        """How much of all entries along some axes is in each device."""
        return 1 / math.prod(map(self._extent, letters))

    def _extent(self, letter):
        axes = self._axes.get(letter, ())
        names = (axes,) if isinstance(axes, str) else axes
        return math.prod(self._mesh.shape[name] for name in names)

    def of_arrays(self, call: split.Call) -> dict[str, P]:
        """Of the arrays of a call that is filled up."""
        return {name: P(*map(self._axes.get, call.letters[name])) for name in call.arrays}

    def by_tokens(self, x: jax.Array, letters: tuple[str, ...]) -> jax.Array:
        """x, of which the compiler is told that its tokens lie over the axis, if they divide."""
        if not set(letters) & set(split.TOKENS):
            return x
        free, along = P.UNCONSTRAINED, lambda n: self.axis if n % self.size == 0 else None
        pairs = zip(letters, x.shape, strict=True)
        spec = P(*(along(n) if letter in split.TOKENS else free for letter, n in pairs))
        return lax.with_sharding_constraint(x, NamedSharding(self._mesh, spec))

    def of_mask(self, mask: masks.Mask | None) -> list[P]:
        """Of the arrays in a mask, which are (B L) or (B N ...)."""
        letters = lambda x: ("B", "") if x.ndim == 2 else ("B", "N", *[""] * (x.ndim - 2))
        place = lambda letter, size: self._axes.get(letter) if size > 1 else None
        return [P(*map(place, letters(x), x.shape)) for x in jax.tree.leaves(mask)]

    def of_output(self, call: split.Call):
        """Of the output, and of the state where it is asked for."""
        place = lambda name: P(*map(self._axes.get, call.letters[name]))
        state = call.options.get("return_state", False)
        return (place("return"), place("initial_state")) if state else place("return")

    def fill_up(self, call: split.Call) -> split.Call:
        """The call with lengths that divide, by repeating the last token, and heads that do."""

        def fill(name, x):
            letters = call.letters[name]
            more = lambda a: self.length(a) - self.sizes[a] if self._is_filled_up(a) else 0
            widths = [(0, more(a)) for a in letters]
            x = jnp.pad(x, widths, "edge") if any(map(sum, widths)) else x
            if self.repeat == 1 or "K" not in letters:
                return x
            return jnp.repeat(x, self.repeat, letters.index("K"))

        return call._replace(arrays={name: fill(name, x) for name, x in call.arrays.items()})

    def cut(self, out, call: split.Call):
        """The output without the tokens that `fill_up` added."""
        if call.options.get("return_state", False):
            return out[0][:, : self.sizes["T"]], out[1]
        return out[:, : self.sizes[call.letters["return"][1]]]


def repeats(N: int, K: int, devices: int) -> int:
    """How often each of K key heads must be there for N query heads to be split with them."""
    G = N // K
    return next(r for r in range(1, G + 1) if G % r == 0 and K * r % devices == 0)
