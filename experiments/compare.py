"""Compare mechanisms under one budget: the same parameters, updates and data, several seeds each.

    attnjax compare --task mqar --mechanisms multi_head_attention hedgehog "moba(block=16, topk=2)"
    attnjax compare --task "mqar(num_pairs=4)" --steps 500 --seeds 5 --mechanisms gqa delta_net

Writes report.html, one file, and results.json. The same command again trains only what is missing,
so a stopped comparison goes on and a longer list of mechanisms adds to it.
"""

import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Sequence

from experiments import config as configs


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare mechanisms under one budget."""

    mechanisms: tuple[str, ...]
    """Mechanisms with their options, as in "gqa(num_kv_heads=2)"."""
    task: str = "mqar"
    """A config by name, with options of its task: mqar, induction, source_text, lra_listops."""
    seeds: int = 3
    """Trainings of each mechanism, with the seeds 0, 1, ..."""
    steps: int | None = None
    """Updates of each training; None: as in the config, which holds for all that may be None."""
    batch_size: int | None = None
    """Examples in an update."""
    learning_rate: float | None = None
    """At its peak; the same for all mechanisms."""
    model: str | None = None
    """Model with its options; every mechanism gets learned positions beside it."""
    target: float = 0.99
    """Test accuracy that ends a training early; the updates until then are a result."""
    parameters: int | None = None
    """Of every model; None: as many as the first mechanism's has."""
    tolerance: float = 0.01
    """Largest difference from that, as a share of it."""
    lengths: tuple[int, ...] = (64, 256, 1024)
    """Lengths at which a training step is measured, each with as many tokens as in training."""
    runs: int = 5
    """Steps of which the median time is taken."""
    directory: str = ""
    """Where everything is written; runs/compare/<task> where empty."""
    mesh: configs.Mesh = configs.Mesh()
    """Devices along the axes data, fsdp, context and tensor."""
    cpu_devices: int = 0
    """Emulate that many devices on a CPU."""


def main(argv: Sequence[str] | None = None) -> int:
    """0 where the comparison is whole or was stopped, 2 for what can't be done, in one line."""
    import tyro

    wanted = tyro.cli(
        Compare,
        prog="attnjax compare",
        description=__doc__,
        args=sys.argv[1:] if argv is None else argv,
    )
    configs.emulate(wanted.cpu_devices)

    from experiments import cells

    try:
        compare(wanted)
    except (ValueError, NotImplementedError) as error:
        print(f"attnjax compare: {error}", file=sys.stderr)
        return 2
    except cells.Stopped:
        print("attnjax compare: stopped; the same command goes on", file=sys.stderr)
    return 0


def compare(wanted: Compare) -> pathlib.Path:
    """Trains, measures and writes what is missing; the path of the page."""
    import rich.console
    import rich.progress

    from experiments import cells, run_directory
    from experiments.comparing import plan as comparison_plan
    from experiments.comparing import report

    console = rich.console.Console(soft_wrap=True)
    root = directory(wanted)
    with console.status("finding equal widths"):
        plan = comparison_plan.make(wanted)
        rows = [_row(config) for config in plan.models]
    # seed by seed, so that a stopped comparison has something of every mechanism
    jobs = list(itertools.product(range(wanted.seeds), zip(plan.models, rows, strict=True)))
    for number, (seed, (config, row)) in enumerate(jobs, 1):
        console.rule(f"{number} of {len(jobs)}: {config.mixers[0]}, seed {seed}")
        row["cells"].append(cells.trained(dataclasses.replace(config, seed=seed), root / "cells"))
    for config, row in rich.progress.track(list(zip(plan.models, rows, strict=True)), "timing"):
        for cost in comparison_plan.at_lengths(config, wanted.lengths):
            row["costs"].append(cells.measured(cost, root / "costs", runs=wanted.runs))
    results = {**plan.settings, "machine": run_directory.environment(), "rows": rows}
    (root / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(report.for_terminal(results))
    page = report.write(root, results)
    console.print(f"report: {page}")
    return page


def directory(wanted: Compare) -> pathlib.Path:
    """Where everything is written."""
    return pathlib.Path(wanted.directory or f"runs/compare/{wanted.task.partition('(')[0]}")


def _row(config) -> dict:
    """What is known of a mechanism's model before it is trained."""
    from experiments import budget

    return {
        "mechanism": config.mixers[0],
        "model": config.model,
        "parameters": budget.parameters(config),
        "state_bytes": budget.state_bytes(config),
        "cells": [],
        "costs": [],
    }


if __name__ == "__main__":
    sys.exit(main())
