"""Values of integers in a compiled program: what says how often a loop runs.

Loops over the tiles of a mask end where positions, constants and the number of the device say:
integers that are known without running the program.
"""

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.planning import hlo
from experiments.planning.integers import Unknown, apply

DEVICE = "device"  # devices are as the iterations of a loop around the program
_LIMIT = 2**22  # numbers of the largest array that is looked at
_MOST = 2**40  # runs of a loop
_RUNS = 2**10  # of one that is gone through, run by run


class NeedsIndex(Exception):
    """The value differs between iterations of a loop."""

    def __init__(self, loop: str):
        super().__init__(loop)
        self.loop = loop


class Caller(NamedTuple):
    """What runs a computation, and with which operand."""

    where: str
    instruction: hlo.Instruction
    operand: int


class _Frame(NamedTuple):
    """One run of a fusion's computation."""

    arguments: Sequence[Callable]
    known: dict[str, Any]


class Values:
    """Evaluates a module. `at` says which iteration of which loop: {name of the while: number}.

    Where an iteration is asked for that `at` doesn't have, NeedsIndex says of which loop.
    """

    def __init__(self, module: hlo.Module):
        self._module, self._callers = module, {}
        for name, computation in module.computations.items():
            for i in computation.instructions:
                for called, operand in _runs(i):
                    # of one with several callers it isn't known who gives the arguments
                    several = called in self._callers
                    self._callers[called] = None if several else Caller(name, i, operand)
        self._known, self._steps = {}, {}

    def get(self, where: str, name: str, at: Mapping):
        """The array of an instruction, or a tuple of functions that give its parts.

        Raises Unknown where it isn't known.
        """
        around, outer = [DEVICE], self._callers.get(where)
        while outer is not None:
            around += [outer.instruction.name] if outer.instruction.op == "while" else []
            outer = self._callers.get(outer.where)
        key = where, name, *map(at.get, around)
        if key not in self._known:
            try:
                self._known[key] = self._compute(where, name, at, None)
            except Unknown as error:
                self._known[key] = error
        if isinstance(self._known[key], Unknown):
            raise self._known[key]
        return self._known[key]

    def _inside(self, frame, where, name, at):
        if name not in frame.known:
            frame.known[name] = self._compute(where, name, at, frame)
        return frame.known[name]

    def _compute(self, where, name, at, frame):
        """frame: of the fusion that `where` belongs to; None for another computation."""
        i = self._module.computations[where].by_name[name]
        inside = functools.partial(self._inside, frame) if frame else self.get
        operand = lambda n: inside(where, i.operands[n], at)
        if i.op == "get-tuple-element":
            parts = operand(0)
            if not isinstance(parts, tuple):
                raise Unknown(name)
            return parts[i.ints("index")[0]]()
        if i.op == "parameter":
            return frame.arguments[int(i.literal)]() if frame else self._argument(where, i, at)
        if i.op == "partition-id":
            return np.asarray(_index(at, DEVICE))
        if i.op == "fusion-done":
            return operand(0)
        if i.op in ("fusion", "fusion-start", "call"):
            inner = self._module.computations[i.called[0]]
            given = [functools.partial(operand, n) for n in range(len(i.operands))]
            return self._inside(_Frame(given, {}), inner.name, inner.root.name, at)
        if i.op == "tuple":
            return tuple(functools.partial(operand, n) for n in range(len(i.operands)))
        if i.op == "while":
            after = functools.partial(self._after, where, i)
            return tuple(functools.partial(after, n, at) for n in range(len(i.shapes)))
        large = any(np.prod(shape.dims, dtype=int) > _LIMIT for shape in i.shapes)
        if large or i.shapes[0].dtype[0] not in "sup":
            raise Unknown(name)
        try:
            return apply(i, self._module.computations[where], self._module, operand)
        except (IndexError, TypeError, ValueError) as error:
            raise Unknown(name) from error  # a form of the operation that isn't known here

    def _argument(self, where, i, at):
        caller = self._callers.get(where)
        if caller is None:
            raise Unknown(i.name)  # an argument of the program
        if caller.instruction.op != "while":
            return self.get(caller.where, caller.instruction.operands[caller.operand], at)
        carried = functools.partial(self._carried, caller)
        return tuple(functools.partial(carried, n, at) for n in range(len(i.shapes)))

    def _carried(self, caller, number, at):
        """What a loop hands on: the same in all iterations, or more by the same in each."""
        loop = caller.instruction
        if (loop.name, number) in at:
            return at[loop.name, number]
        step = self._step(caller.where, loop, number, at)
        first = self.get(caller.where, loop.operands[0], at)[number]()
        return first + step * _index(at, loop.name) if step else first

    def trips(self, loop: hlo.Instruction, at: Mapping) -> int:
        """Runs of a loop: the first iteration for which its condition doesn't hold.

        Raises Unknown where that isn't known.
        """
        condition = self._module.computations[loop.attribute("condition")]
        holds = lambda n: self.get(condition.name, condition.root.name, {**at, loop.name: n})
        try:
            return _first(lambda n: not holds(n))
        except Unknown:
            if known := re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', loop.attributes):
                return int(known[1])
            raise

    def _after(self, where, loop, number, at):
        """What a loop leaves: what it began with, or what its runs make of that, one by one.

        Tables go through loops and beyond, and some are written by them row by row.
        """
        value = self.get(where, loop.operands[0], at)[number]()
        with contextlib.suppress(Unknown):  # it may be known run by run all the same
            if self._step(where, loop, number, at) == 0:
                return value
        trips = self.trips(loop, at)
        if trips > _RUNS:
            raise Unknown(loop.name)
        for n in range(trips):
            value = self._next(loop, number, {**at, loop.name: n}, value)
        return value

    def _step(self, where, loop, number, at):
        """What an iteration adds, from what it makes of 0, 1 and 7.

        While that is tried out it is unknown to others, so that none is wrongly taken for constant.
        """
        key = loop.name, number
        if key not in self._steps:
            self._steps[key] = None
            try:
                added = self._added(where, loop, number, at)
                self._steps[key] = added.pop() if len(added) == 1 else None
            except NeedsIndex as error:
                if error.loop != loop.name:  # ask again when that is known
                    del self._steps[key]
                    raise
        if self._steps[key] is None:
            raise Unknown(loop.name)
        return self._steps[key]

    def _added(self, where, loop, number, at):
        given = [np.full(loop.shapes[number].dims, x) for x in (0, 1, 7)]
        made = [self._next(loop, number, at, x) for x in given]
        if all(np.array_equal(x, made[0]) for x in made):  # it is brought from elsewhere
            first = self.get(where, loop.operands[0], at)[number]()
            if np.array_equal(first, made[0]):
                return {0}
        return set(np.ravel([y - x for x, y in zip(given, made, strict=True)]))

    def _next(self, loop, number, at, given):
        """What an iteration makes of what a loop hands on, if that is `given`."""
        body = self._module.computations[loop.attribute("body")]
        trial = copy.copy(self)
        trial._known = {}  # what is made up here must not be remembered
        now = {outer: n for outer, n in at.items() if isinstance(outer, str)}
        return trial.get(body.name, body.root.name, {**now, (loop.name, number): given})[number]()


def _first(holds):
    """The least number for which something holds that holds for all from there on."""
    above = 1
    while not holds(above - 1):
        above *= 2
        if above > _MOST:
            raise Unknown("a loop without an end")
    below = above // 2
    while below < above:
        middle = (below + above) // 2
        below, above = (below, middle) if holds(middle) else (middle + 1, above)
    return below


def _runs(i: hlo.Instruction):
    """(computation, number of the operand that it gets) of each that an instruction runs."""
    if i.op == "while":
        yield from ((i.attribute(part), 0) for part in ("body", "condition"))
    elif i.op == "call" and len(i.operands) == 1:
        yield i.called[0], 0
    elif i.op == "conditional":
        yield from ((branch, number + 1) for number, branch in enumerate(i.called))


def _index(at, loop):
    if at.get(loop) is None:
        raise NeedsIndex(loop)
    return at[loop]
