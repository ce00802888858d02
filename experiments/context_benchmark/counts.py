"""What a compiled cell holds, sends and computes, by its text."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.planning import collectives, cost, count, hlo, program
from experiments.planning import runs as plan_runs


def of(compiled: jax.stages.Compiled, islands: Sequence[int]) -> dict[str, Any]:
    """Of the busiest device; islands: of each device, which it is in (`planning.collectives`).

    `balance` is the operations of the busiest device over those of the mean one. Both are None
    where it isn't known how often a loop runs, as where data decide. `in_full` are kernels counted
    as if they skipped nothing, which makes devices look more alike than they are.
    """
    used = compiled.memory_analysis()
    fresh = used.output_size_in_bytes - used.alias_size_in_bytes
    module = hlo.read(program.text(compiled))
    runs = plan_runs.runs(module, range(len(islands)))
    work, sent, hidden, between = np.zeros(len(islands)), Counter(), 0.0, 0.0
    for name, times in runs.times.items():
        where = module.computations[name]
        for i in where.instructions:
            work += cost.flops(i, where, module) * runs.of(where, i)
        for one in collectives.found(where, module, islands):
            sent[one.kind] += one.sent * times.max()
            hidden += one.sent * one.overlapped * times.max()
            between += one.between * times.max()
    known = not runs.unknown and work.any()
    return {
        "temporaries": used.temp_size_in_bytes,
        "memory": used.argument_size_in_bytes + used.temp_size_in_bytes + fresh,
        "sent": {kind: float(n) for kind, n in sorted(sent.items())},
        "sent_hidden": float(hidden),
        "sent_between_hosts": float(between),
        "operations": float(work.max()) if known else None,
        "balance": float(work.max() / work.mean()) if known else None,
        "in_full": in_full(module, runs),
    }


def in_full(module: hlo.Module, runs: plan_runs.Runs) -> list[str]:
    """Kernels that may skip tiles, and are counted as if they didn't.

    One whose first operand is the length of its grid may, also where it isn't known which.
    """
    found = set(runs.full)
    for name in runs.times:
        where = module.computations[name]
        for i in where.instructions:
            lengths = cost.is_kernel(i) and not where.by_name[i.operands[0]].shapes[0].dims
            if lengths and (name, i.name) not in runs.partly:
                found.add(i.source)
    return sorted({count.short(source) for source in found})
