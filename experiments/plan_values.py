"""Values of integers in a compiled program: what says how often a loop runs.

Loops over the tiles of a mask end where positions, constants and the number of the device say:
integers that are known without running the program.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import plan_hlo as hlo
from experiments.plan_integers import Unknown, apply

DEVICE = "device"  # devices are as the iterations of a loop around the program
_LIMIT = 2**22  # numbers of the largest array that is looked at


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
        step = self._step(loop, number, at)
        first = self.get(caller.where, loop.operands[0], at)[number]()
        return first + step * _index(at, loop.name) if step else first

    def _after(self, where, loop, number, at):
        """What a loop leaves, where that is what it began with: tables go through it and beyond."""
        if self._step(loop, number, at):
            raise Unknown(loop.name)
        return self.get(where, loop.operands[0], at)[number]()

    def _step(self, loop, number, at):
        """What an iteration adds, from what it makes of 0, 1 and 7.

        While that is tried out it is unknown to others, so that none is wrongly taken for constant.
        """
        key = loop.name, number
        if key not in self._steps:
            self._steps[key] = None
            try:
                added = self._added(loop, number, at)
                self._steps[key] = added.pop() if len(added) == 1 else None
            except NeedsIndex as error:
                if error.loop != loop.name:  # ask again when that is known
                    del self._steps[key]
                    raise
        if self._steps[key] is None:
            raise Unknown(loop.name)
        return self._steps[key]

    def _added(self, loop, number, at):
        body = self._module.computations[loop.attribute("body")]
        added = set()
        for x in (0, 1, 7):
            trial = copy.copy(self)
            trial._known = {}  # what is made up here must not be remembered
            given = np.full(body.root.shapes[number].dims, x)
            now = {outer: n for outer, n in at.items() if isinstance(outer, str)}
            now[loop.name, number] = given
            added |= set(np.ravel(trial.get(body.name, body.root.name, now)[number]() - given))
        return added


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
