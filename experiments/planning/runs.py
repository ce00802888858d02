"""How often each computation of a compiled program runs, on each of some devices."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from experiments.planning import cost, hlo, values
from experiments.planning.integers import Unknown


class Runs(NamedTuple):
    """Numbers of runs by computation, for each device; and where they aren't known."""

    times: dict[str, np.ndarray]
    partly: dict[tuple[str, str], np.ndarray]  # of kernels that skip tiles: in units of all tiles
    unknown: tuple[str, ...]  # loops counted once, conditionals counted by their first branch
    full: tuple[str, ...]  # kernels counted as if they skipped no tile

    def of(self, where: hlo.Computation, i: hlo.Instruction) -> np.ndarray:
        """Of an instruction, which costs that often what it costs at most."""
        return self.partly.get((where.name, i.name), self.times[where.name])


def runs(module: hlo.Module, devices: Iterable[int]) -> Runs:
    """Runs of every computation that the program reaches but by fusions and reductions."""
    walk = _Walk(module)
    entry = lambda **at: walk.through(module.entry, at)
    try:
        each = [entry()] * len(list(devices))
    except values.NeedsIndex:
        each = [entry(**{values.DEVICE: number}) for number in devices]
    of = lambda name: np.array([float(counter[name]) for counter in each])
    times = {name: of(name) for counter in each for name in counter if isinstance(name, str)}
    partly = {name: of(name) for name in walk.skipping}
    return Runs(times, partly, *(tuple(sorted(x)) for x in (walk.unknown, walk.full)))


class _Walk:
    def __init__(self, module):
        self._module, self._values = module, values.Values(module)
        self.unknown, self.skipping, self.full = set(), set(), set()

    def through(self, name, at) -> Counter:
        """Runs of a computation and of all that it reaches when it runs once."""
        total = Counter({name: 1})
        for i in self._module.computations[name].instructions:
            if i.op == "while":
                total += self._loop(name, i, at)
            elif i.op == "conditional":
                total += self.through(self._branch(name, i, at), at)
            elif i.op == "call":
                total += self.through(i.called[0], at)
            elif states := cost.states_of_tiles(i, self._module.computations[name]):
                self.skipping.add((name, i.name))
                total[name, i.name] = self._share(name, i, states, at)
        return total

    def _share(self, where, i, states, at):
        """How much of its tiles a kernel computes."""
        try:
            return float(np.mean(self._values.get(where, states, at) != 0))
        except Unknown:
            self.full.add(i.source)
            return 1.0

    def _loop(self, where, i, at):
        trips, body = self._trips(i, at), i.attribute("body")
        try:
            inner = self.through(body, {**at, i.name: None})
            return Counter({name: count * trips for name, count in inner.items()})
        except values.NeedsIndex as error:
            if error.loop != i.name:
                raise
        each = (self.through(body, {**at, i.name: number}) for number in range(trips))
        return sum(each, Counter())

    def _trips(self, i, at):
        try:
            return self._values.trips(i, at)
        except Unknown:
            self.unknown.add(i.source)
            return 1

    def _branch(self, where, i, at):
        branches = i.called
        try:
            choice = int(self._values.get(where, i.operands[0], at))
        except Unknown:
            self.unknown.add(i.source)
            return branches[0]
        if i.attribute("true_computation"):
            return branches[0] if choice else branches[1]
        return branches[choice if 0 <= choice < len(branches) else -1]
