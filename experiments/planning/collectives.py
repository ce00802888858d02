"""Collectives of a compiled program: what each device sends, and whether work hides it.

Bytes are those that a device sends by an algorithm that sends least, for n bytes on each of P
devices: all-gather n (P - 1), reduce-scatter and all-to-all n (P - 1) / P, all-reduce twice as much
as reduce-scatter, collective-permute n. Islands are devices that a faster network joins: what goes
between them is what each must get from the others, divided by the devices that share in it.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.planning import cost, hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
         "collective-permute", "collective-broadcast")  # fmt: skip


class Collective(NamedTuple):
    """One that runs once when its computation runs."""

    kind: str
    source: str
    sent: float  # bytes by a device
    between: float  # of these, from island to island
    overlapped: bool  # matrix products, kernels or loops run between its start and its end


def found(where: hlo.Computation, module: hlo.Module, islands: Sequence[int]) -> list[Collective]:
    """Those of a scheduled computation, without its loops'; islands: of each device, its own."""
    result, chains = [], _Chains(where, module, islands)
    for number, i in enumerate(where.instructions):
        if _is_collective(i):
            end = _end(where, i) if i.op.endswith("-start") else number
            busy = _busy(where, module, range(number + 1, end))
            result.append(_describe(i, where, islands, busy))
        elif i.op == "async-start":
            busy = _busy(where, module, range(number + 1, _end(where, i)))
            inner = module.computations[i.called[0]]
            parts = filter(_is_collective, inner.instructions)
            result += [_describe(part, inner, islands, busy) for part in parts]
        elif i.op == "fusion":
            chains.add(number, i)
    return result + chains.result


class _Chains:
    """Collectives in fusions: one fusion starts it, some carry it on as they work, one ends it."""

    def __init__(self, where, module, islands):
        self._where, self._module, self._islands = where, module, islands
        self.result, self._open = [], {}  # of each that has started: (place in result, number)

    def add(self, number, i):
        """What fusion i, instruction `number`, does to collectives."""
        inner = self._module.computations[i.called[0]]
        calls = " ".join(j.attributes for j in inner.instructions if j.op == "custom-call")
        starts, ends = (f"AsyncCollective{what}" in calls for what in ("Start", "Done"))
        goes_on = inner.name.startswith("async_collective_fusion")
        for part in filter(_is_collective, inner.instructions):
            key = part.attribute("channel_id"), part.source
            if goes_on and key not in self._open:
                continue  # in a loop's body, of one that was started before the loop
            if starts or key not in self._open:
                self._open[key] = len(self.result), number
                self.result.append(_describe(part, inner, self._islands, False, fusion=i))
            place, start = self._open[key]
            since = range(start + 1, number if ends else number + 1)
            if _busy(self._where, self._module, since):
                self.result[place] = self.result[place]._replace(overlapped=True)
            if ends or (start == number and not starts):  # or all of it is in this one
                del self._open[key]


def _is_collective(i):
    return i.op.removesuffix("-start") in KINDS


def _end(where, start):
    """The place of the instruction that waits for another."""
    names = {start.name}
    for number, i in enumerate(where.instructions):
        if names & set(i.operands):
            if i.op.endswith("-done"):
                return number
            names.add(i.name)
    raise ValueError(f"nothing waits for {start.name}")


def _busy(where, module, numbers):
    """Whether some instruction takes its time: elementwise ones don't count."""
    some = (where.instructions[number] for number in numbers)
    return any(
        i.op in ("while", "conditional", "call")
        or cost.is_kernel(i)
        or cost.flops(i, where, module) > 0
        for i in some
    )


def _describe(i, where, islands, overlapped, fusion=None):
    kind, source = i.op.removesuffix("-start"), i.source
    if fusion is not None:
        slices = (j for j in where.instructions if j.op == "dynamic-slice")
        cut = any(i.name in _origins(j, where) for j in slices)
        kind = "reduce-scatter" if kind == "all-reduce" and cut else kind
        source = i.source if i.source != i.name else fusion.source
    n = sum(s.logical_bytes for name in i.operands for s in where.by_name[name].shapes)
    if "permute" in kind:
        pairs = i.attributes.partition("source_target_pairs=")[2].partition("}}")[0]
        pairs = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", pairs)]
        moves = any(a != b for a, b in pairs)
        crosses = any(islands[a] != islands[b] for a, b in pairs)
        return Collective(kind, source, n * moves, n * crosses, overlapped)
    group = groups(i, len(islands))[0]
    sent, between = _shares(kind, len(group), len({islands[device] for device in group}))
    return Collective(kind, source, n * sent, n * between, overlapped)


def _shares(kind, P, apart):
    """Of n bytes on each of P devices on `apart` islands: (sent by a device, of that between)."""
    scattered = (P - 1) / P, (apart - 1) / P
    return {
        "all-gather": (P - 1, apart - 1),
        "reduce-scatter": scattered,
        "all-reduce": (2 * scattered[0], 2 * scattered[1]),
        "all-to-all": (scattered[0], (apart - 1) / apart),
        "ragged-all-to-all": (scattered[0], (apart - 1) / apart),
        "collective-broadcast": scattered,
    }[kind]


def _origins(i, where):
    """Names of an instruction's first operand, and of what that is an element of."""
    first = where.by_name[i.operands[0]]
    return {first.name, *(first.operands if first.op == "get-tuple-element" else ())}


def groups(i: hlo.Instruction, devices: int) -> np.ndarray:
    """(groups, devices of each) of a collective, in any of the forms in which they are written."""
    text = i.attributes.partition("replica_groups=")[2]
    if text.startswith("mesh["):
        return _of_mesh(text)
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        numbers = lambda part: [int(x) for x in part.split(",")] if part else None
        shape, dims, order = map(numbers, iota.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(shape)
    listed = re.findall(r"\{([\d,]+)\}", text[: text.find("}}") + 1])
    if listed:
        return np.array([[int(x) for x in group.split(",")] for group in listed])
    return np.arange(devices)[None]


def _of_mesh(text):
    """mesh['a'=2,'b'=4] {'b'}: groups along the axes named last, or 'b':(1)2 for a part of one."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", text.partition("]")[0])}
    chosen = text.partition("{")[2].partition("}")[0]
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    dims, along = [], []
    for name, size in sizes.items():
        mine = [(int(a or 1), int(b or size)) for axis, a, b in parts if axis == name]
        before, inside = mine[0] if mine else (size, 1)
        dims += [before, inside, size // (before * inside)]
        along += [len(dims) - 2] if mine else []
    rest = [axis for axis in range(len(dims)) if axis not in along]
    ids = np.arange(math.prod(dims)).reshape(dims).transpose(rest + along)
    return ids.reshape(-1, math.prod(dims[axis] for axis in along))
