"""Reads the text of a compiled program: its computations, instructions and shapes.

Only what is written is read; nothing is computed. Bytes are those that an array takes in memory:
filled up to the tiles of its layout, where it has tiles.
"""

import functools
import math
import re
from typing import NamedTuple

import numpy as np

_BITS = dict(pred=8, bf16=16, token=0, u4=4, s4=4, u2=2, s2=2, c64=64, c128=128)
_BITS |= {f"{kind}{n}": n for kind in "suf" for n in (8, 16, 32, 64)}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")


class Shape(NamedTuple):
    """An array as one device holds it."""

    dtype: str
    dims: tuple[int, ...]
    layout: str  # as in "1,0:T(8,128)S(1)": axes from the minor one, tiles, memory space

    @property
    def bytes(self) -> int:
        """With what fills it up to whole tiles; 0 outside of the device's main memory."""
        if re.search(r"S\([1-9]", self.layout):  # on the chip, or a semaphore
            return 0
        dims = [self.dims[axis] for axis in self.minor_to_major]
        for axis, tile in enumerate(self._tile[::-1][: len(dims)]):
            dims[axis] = -(-dims[axis] // tile) * tile
        return math.prod(dims) * bits(self.dtype) // 8

    @property
    def logical_bytes(self) -> int:
        """Of its numbers alone, wherever they are."""
        return math.prod(self.dims) * bits(self.dtype) // 8

    @property
    def minor_to_major(self) -> tuple[int, ...]:
        """Axes from the one whose neighbours lie side by side."""
        order = self.layout.partition(":")[0]
        return _ints(order) if order else tuple(range(len(self.dims)))[::-1]

    @property
    def _tile(self):
        return self._tiles[0] if self._tiles else ()

    @property
    def _tiles(self):
        """Tiles, and tiles within them."""
        found = re.search(r"T((?:\([\d,]+\))+)", self.layout)
        return [_ints(tile) for tile in found[1][1:-1].split(")(")] if found else []

    def places(self) -> np.ndarray:
        """What lies side by side in memory: numbers of entries in row order, -1 for what fills up.

        It takes as much memory as the array, eight bytes an entry.
        """
        x = np.arange(math.prod(self.dims)).reshape(self.dims)
        x = x.transpose(self.minor_to_major[::-1])
        for tile in self._tiles:
            x = _tiled(x, tile)
        return x.ravel()


def _tiled(x, tile):
    """Cut along its last axes, the tiles before what is in them."""
    x = x.reshape((1,) * (len(tile) - x.ndim) + x.shape)
    lead = x.ndim - len(tile)
    widths = [(0, 0)] * lead + [(0, -n % t) for n, t in zip(x.shape[lead:], tile, strict=True)]
    x = np.pad(x, widths, constant_values=-1)
    cut = [part for n, t in zip(x.shape[lead:], tile, strict=True) for part in (n // t, t)]
    axes = [*range(lead), *range(lead, lead + len(cut), 2), *range(lead + 1, lead + len(cut), 2)]
    return x.reshape(*x.shape[:lead], *cut).transpose(axes)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    op: str
    shapes: tuple[Shape, ...]  # of the output; several for a tuple
    operands: tuple[str, ...]  # names of instructions of the same computation
    literal: str  # what stands in the parentheses
    attributes: str  # what follows them
    root: bool

    def attribute(self, name: str) -> str:
        """The value of name=value, of name={value} without the braces; "" where there is none."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|%?([^,\s]+))", self.attributes)
        return (found[1] if found[1] is not None else found[2]) if found else ""

    def ints(self, name: str) -> tuple[int, ...]:
        """An attribute of numbers, as in dimensions={0,1}."""
        return _ints(self.attribute(name))

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs: of a fusion or call, of all branches, of a loop its body."""
        names = ("calls", "to_apply", "body", "true_computation", "false_computation")
        branches = _NAME.findall(self.attribute("branch_computations"))
        return (*(x for x in map(self.attribute, names) if x), *branches)

    @property
    def source(self) -> str:
        """Where it comes from in the traced function; its own name where that isn't known."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found and found[1] else self.name


class Computation(NamedTuple):
    """Instructions in the order in which they run, if the program is scheduled."""

    name: str
    instructions: tuple[Instruction, ...]
    by_name: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The instruction whose output is the computation's."""
        return next(i for i in reversed(self.instructions) if i.root)

    @property
    def parameters(self) -> list[Instruction]:
        """In the order in which they are given."""
        found = [i for i in self.instructions if i.op == "parameter"]
        return sorted(found, key=lambda i: int(i.literal))


class Module(NamedTuple):
    """A program."""

    computations: dict[str, Computation]
    entry: str
    scheduled: bool


def read(text: str) -> Module:
    """The program that `text` is, as `Compiled.as_text()` gives it; ValueError for other text."""
    computations, entry, name, lines = {}, None, None, []
    for line in text.splitlines():
        if line.startswith("}"):
            computations[name] = _computation(name, lines)
        elif line.endswith("{") and (found := re.match(r"(ENTRY )?%?([\w.\-]+) ?\(", line)):
            name, lines = found[2], []
            entry = name if found[1] else entry
        elif line.startswith("  "):
            lines.append(line)
    if entry is None:
        raise ValueError("the text must be that of a compiled program, with an ENTRY computation")
    return Module(computations, entry, "is_scheduled=true" in text[:10_000])


def _computation(name, lines):
    instructions = tuple(map(_instruction, lines))
    return Computation(name, instructions, {i.name: i for i in instructions})


def _instruction(line):
    left, _, right = line.strip().partition(" = ")
    end = _closing(right, 0) if right.startswith("(") else right.index(" ")
    op, _, _ = right[end:].strip().partition("(")
    start = right.index("(", end)
    stop = _closing(right, start)
    literal = right[start + 1 : stop - 1]
    return Instruction(
        name=left.removeprefix("ROOT ").removeprefix("%"),
        op=op,
        shapes=shapes(right[:end]),
        operands=tuple(_NAME.findall(literal)),
        literal=literal,
        attributes=right[stop:],
        root=left.startswith("ROOT "),
    )


def _closing(text, start):
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.end()
    raise ValueError(f"a parenthesis stays open in {text[start : start + 80]!r}")


@functools.cache
def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type, those of a tuple one after the other."""
    return tuple(Shape(t, _ints(dims), layout) for t, dims, layout in _ARRAY.findall(text))


def bits(dtype: str) -> int:
    """Of a number; ValueError for a type that isn't known."""
    if dtype.startswith("f8") or dtype.startswith("f4"):
        return int(dtype[1])
    if dtype not in _BITS:
        raise ValueError(f"{dtype=} must be one of {', '.join(_BITS)}")
    return _BITS[dtype]


def _ints(text):
    return tuple(int(x) for x in re.findall(r"\d+", text))
