"""What a compiled program does on each device, counted through the runs of its loops.

Nothing is promised about time but a lower bound: at least what its matrix products take at the peak
rate, or its traffic with main memory at the peak bandwidth, whichever is longer for each
instruction, and what its collectives take on all links at once, where nothing hides them.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from experiments.planning import accelerators, cost, hlo
from experiments.planning import collectives as plan_collectives
from experiments.planning import runs as plan_runs


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind, on the busiest device."""

    count: float = 0
    bytes: float = 0  # sent by the device
    overlapped: float = 0  # how many of them
    exposed_bytes: float = 0  # of the others
    between: float = 0  # bytes, of all, that go from host to host
    exposed_between: float = 0


@dataclasses.dataclass(frozen=True)
class Count:
    """Sums over one step, on the busiest device."""

    flops: float
    mean_flops: float  # over devices that differ in the part of the sequence that they hold
    bytes: float
    kernel_flops: float  # of flops, what Pallas kernels say about themselves
    kernels_without_cost: tuple[str, ...]
    kernels_in_full: tuple[str, ...]  # that may skip tiles: counted as if they skipped none
    collectives: dict[str, Traffic]
    exposed: tuple[tuple[str, str, float], ...]  # (kind, source, bytes), the largest
    buffers: tuple[tuple[str, str, int], ...]  # (source, shape, bytes), the largest
    unknown: tuple[str, ...]  # loops and conditionals whose runs depend on data
    seconds: dict[str, float]  # of products, memory, exposed and all collectives: lower bounds


def count(
    module: hlo.Module,
    accelerator: accelerators.Accelerator,
    *,
    devices: Sequence[int],
    islands: Sequence[int],
) -> Count:
    """The sums. devices: those to look at, by number; islands: of every device, which it is in."""
    runs = plan_runs.runs(module, devices)
    each = [(module.computations[name], times) for name, times in runs.times.items()]
    work = np.zeros((4, len(devices)))
    for where, _ in each:
        for i in where.instructions:
            work += np.outer(_work(i, where, module, accelerator), runs.of(where, i))
    kernels = [(i, runs.of(where, i)) for where, _ in each for i in where.instructions
               if cost.is_kernel(i)]  # fmt: skip
    by_kernels = sum(cost.kernel_cost(i).get("flops", 0) * n for i, n in kernels)
    traffic, exposed = _traffic(each, module, islands)
    return Count(
        flops=float(work[0].max()),
        mean_flops=float(work[0].mean()),
        bytes=float(work[1].max()),
        kernel_flops=float(np.max(by_kernels)),
        kernels_without_cost=tuple(
            sorted({short(i.source) for i, _ in kernels if not cost.kernel_cost(i)})
        ),
        kernels_in_full=tuple(map(short, runs.full)),
        collectives=traffic,
        exposed=exposed,
        buffers=_buffers(each, module),
        unknown=tuple(map(short, runs.unknown)),
        seconds=_seconds(work[2:], traffic, accelerator),
    )


def _seconds(work, traffic, accelerator):
    """Lower bounds: of the device whose instructions take longest, and of collectives."""
    products, memory = work[:, work.sum(0).argmax()]

    def sending(sent, between):
        sums = (sum(getattr(kind, field) for kind in traffic.values()) for field in (sent, between))
        inside, across = sums
        return max(inside / accelerator.links, across / (accelerator.network or 1.0))

    return {
        "products": float(products),
        "memory": float(memory),
        "exposed collectives": sending("exposed_bytes", "exposed_between"),
        "all collectives": sending("bytes", "between"),
    }


def _traffic(each, module, islands):
    """(Traffic by kind, the largest that nothing overlaps)."""
    traffic, exposed = defaultdict(Traffic), defaultdict(float)
    for where, times in each:
        for one in plan_collectives.found(where, module, islands):
            _add(traffic[one.kind], one, times.max())
            if not one.overlapped:
                exposed[one.kind, short(one.source)] += one.sent * times.max()
    return dict(sorted(traffic.items())), _largest((*key, n) for key, n in exposed.items())


def _buffers(each, module):
    """The largest arrays, each place and shape once."""
    found = {
        (short(i.source), text(shape)): shape.bytes
        for where, _ in each
        for i in where.instructions
        for shape in _made(i, where, module)
    }
    return _largest((*key, size) for key, size in found.items())


def _work(i, where, module, accelerator):
    """flops, bytes, seconds of products, seconds of memory: of one instruction.

    Its products and its traffic overlap, so the longer of both counts.
    """
    flops, bytes = cost.flops(i, where, module), cost.moved(i, where, module)
    large = bytes and cost.moved(i, where, module, larger_than=accelerator.cache)
    arithmetic, traffic = flops / accelerator.flops, large / accelerator.bandwidth
    longer = (arithmetic, 0.0) if arithmetic >= traffic else (0.0, traffic)
    return flops, bytes, *longer


def _add(total, one, times):
    total.count += times
    total.bytes += one.sent * times
    total.between += one.between * times
    total.overlapped += one.overlapped * times
    total.exposed_bytes += (not one.overlapped) * one.sent * times
    total.exposed_between += (not one.overlapped) * one.between * times


_ALIASES = {
    *("get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "constant"),
    *("dynamic-update-slice", "optimization-barrier", "after-all", "copy-start", "slice-start"),
}


def _made(i, where, module):
    """Arrays in main memory that an instruction makes, rather than passes on."""
    if i.op in _ALIASES or i.op.endswith(("-done", "-update")):
        return ()
    if i.op == "parameter" and where.name != module.entry:
        return ()
    if i.op in ("fusion", "fusion-start"):
        return (s for s, written in cost.outputs(module.computations[i.called[0]])
                if written == s.bytes and s.bytes)  # fmt: skip
    return i.shapes[:1] if i.op.endswith("-start") else i.shapes


def _largest(rows, most=12):
    return tuple(sorted(rows, key=lambda row: (-row[-1], row))[:most])


def text(shape: hlo.Shape) -> str:
    """bf16[4,512]."""
    return f"{shape.dtype}[{','.join(map(str, shape.dims))}]"


_NOISE = {"while", "body", "cond", "eval_jaxpr", "shard_map", "closed_call", "checkpoint",
          "jit(update)", "jvp()", "transpose(jvp())", "layers.<lambda>", ""}  # fmt: skip


def short(source: str) -> str:
    """A path of the traced function as a person reads it: which pass, then where in the model."""
    if source.startswith(("state", "batch")):  # an argument: state['params']['embed']
        return "/".join(source.replace("\\'", "").replace("]", "").replace("'", "").split("["))
    passed = "again " if "rematted_computation" in source else (
        "backward " if "transpose(" in source else "forward " if "jvp(" in source else ""
    )  # fmt: skip
    # of what was fused from several places, the first
    first = source.split(";")[0].split(":")[0].replace("/(", "/").removeprefix("(")
    parts = [part for part in first.split("/") if part not in _NOISE]
    parts = [part for part in parts if "jvp(" not in part and part != "rematted_computation"]
    kept = [a for a, b in itertools.pairwise([*parts, ""]) if not b.startswith(f"{a}.")]
    return passed + ("/".join(kept[-5:]) or first)
