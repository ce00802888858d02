"""How the arguments of a record's function lie on a mesh, read off the letters of its annotations.

B lies over data and fsdp, T and S over the context axis, N and K over tensor; all other axes are
whole in each device. Masks are split by batch (and by head, where they have one): positions stay
global.
"""

import inspect
import math
import re
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from attnjax.core import masks, registry


class Call(NamedTuple):
    """The arguments of a function: arrays whose axes have letters, the mask, and the rest."""

    letters: dict[str, tuple[str, ...]]  # of arrays, and of the output as "return"
    arrays: dict[str, jax.Array]
    mask: masks.Mask | None
    options: dict[str, Any]


class Strategy(NamedTuple):
    """What a strategy does."""

    check: Callable[[registry.Mechanism, Call], None]  # raises for what it can't honour
    run: Callable[..., Any]  # (record, options, arrays, mask, *, axis, lengths) on one device


def bind(fn: Callable, args, options) -> Call:
    """The call `fn(*args, **options)`, with every default."""
    signature = inspect.signature(fn)
    bound = signature.bind(*args, **options)
    bound.apply_defaults()
    given = dict(bound.arguments)
    annotations = {name: p.annotation for name, p in signature.parameters.items()}
    letters = {name: _letters(x) for name, x in annotations.items()}
    arrays = {name: x for name, x in given.items() if hasattr(x, "shape") and letters[name]}
    letters["return"] = _letters(signature.return_annotation)
    mask = jax.tree.map(jnp.asarray, given.pop("mask", None))
    return Call(letters, arrays, mask, {k: x for k, x in given.items() if k not in arrays})


def only(record: registry.Mechanism, call: Call, honoured: tuple[str, ...], *, by: str) -> None:
    """Raises NotImplementedError, naming what `by` can honour, for any other argument given."""
    defaults = {n: p.default for n, p in inspect.signature(record.fn).parameters.items()}
    for name, value in (call.options | call.arrays).items():
        if name not in honoured and (name in call.arrays or value != defaults[name]):
            raise NotImplementedError(f"{by} can't honour {name}; it can {', '.join(honoured)}")


def _letters(annotation):
    """The axes of the first jaxtyping annotation in a type; () where there is none."""
    for kind in (annotation, *typing.get_args(annotation)):
        if hasattr(kind, "dim_str"):
            return tuple(re.sub(r"^[#*?_]+", "", axis) for axis in kind.dim_str.split())
    return ()


class Places:
    """Where the axes of a call lie on a mesh. `sizes` are those of its letters."""

    def __init__(self, mesh: jax.sharding.Mesh, axis: str, call: Call):
        self.sizes = {}
        for name, array in call.arrays.items():
            for letter, size in zip(call.letters[name], array.shape, strict=True):
                self.sizes[letter] = max(size, self.sizes.get(letter, 1))
        self._count = mesh.shape[axis]
        whole = lambda letter, extent: self.sizes.get(letter, extent) % extent == 0
        batch = tuple(name for name in ("data", "fsdp") if name in mesh.shape)
        tensor = mesh.shape.get("tensor", 1)
        self._axes = {"T": axis, "S": axis}
        if whole("B", math.prod(mesh.shape[name] for name in batch)):
            self._axes["B"] = batch
        if whole("N", tensor) and (whole("K", tensor) or self.sizes["K"] == 1):
            self._axes |= {letter: "tensor" for letter in "NK" if tensor > 1}

    def _spec(self, letters, shape) -> P:
        axes = zip(letters, shape, strict=True)
        return P(*(self._axes.get(letter) if size > 1 else None for letter, size in axes))

    def of_arrays(self, call: Call) -> dict[str, P]:
        """Of the arrays of a call that is filled up."""
        return {name: self._spec(call.letters[name], x.shape) for name, x in call.arrays.items()}

    def of_mask(self, mask: masks.Mask | None) -> list[P]:
        """Of the arrays in a mask, which are (B L) or (B N ...)."""
        letters = lambda x: ("B", "") if x.ndim == 2 else ("B", "N", *[""] * (x.ndim - 2))
        return [self._spec(letters(x), x.shape) for x in jax.tree.leaves(mask)]

    def of_output(self, call: Call):
        """Of the output, and of the state where it is asked for."""
        place = lambda name: P(*map(self._axes.get, call.letters[name]))
        state = call.options.get("return_state", False)
        return (place("return"), place("initial_state")) if state else place("return")

    def _extra(self, letter) -> int:
        return -self.sizes[letter] % self._count if letter in ("T", "S") else 0

    def fill_up(self, call: Call) -> Call:
        """The call with sequences of a length that divides, by repeating the last token."""

        T = self.sizes["T"]
        if self._extra("T") and call.options.get("return_state", False):
            raise NotImplementedError(f"return_state needs {T=} to be a multiple of {self._count}")

        def fill(name, x):
            widths = [(0, self._extra(letter)) for letter in call.letters[name]]
            return jnp.pad(x, widths, "edge") if any(map(sum, widths)) else x

        return call._replace(arrays={name: fill(name, x) for name, x in call.arrays.items()})

    def cut(self, out, call: Call):
        """The output without the tokens that `fill_up` added."""
        if call.options.get("return_state", False):
            return out[0][:, : self.sizes["T"]], out[1]
        return out[:, : self.sizes["T"]]
