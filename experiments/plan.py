"""Compile a training step for accelerators that aren't here, and say what is known of it before.

    attnjax plan source_text --target v5e:2x2
    attnjax plan lm_1b --target v5e:16x16 --mesh.fsdp 64 --mesh.context 4 --longest --json 1b.json

It is the step that `attnjax train` with the same options would run, compiled by the accelerator's
own compiler on this CPU: whether it fits, what it holds, computes and sends. A time is a lower
bound, never a forecast. How to read it: docs/plan.md.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

from attnjax.core import registry
from experiments import config as configs

_UNIT = 128  # tokens on a device: lengths that are tried are multiples of it
_CLOSE = 1 / 16  # of the longest length: what the search leaves open
_MOST = 2**27  # tokens


@dataclasses.dataclass(frozen=True)
class Plan(configs.Experiment):
    """What to plan."""

    target: str = ""
    """Accelerator and topology: v5p:4x4x4, v5e:16x16, v6e:8x8, h100:8, h100:2x8."""
    context_strategies: tuple[str, ...] | None = None
    """Strategies of context parallelism to compare, as in ring "ring(order='zigzag')"; all of the
    mechanisms' where there are none, mesh.context > 1 and no --strategy is given."""
    longest: bool = False
    """Search the longest sequence that fits, for the best strategy; compiles several times."""
    json: str = ""
    """Also write everything into this file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses a plan and makes it; 2 for what can't be planned, said in one line."""
    import tyro

    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if args and not args[0].startswith("-"):
            configs.named(args[0])
        choices = {
            name: (doc, Plan(**vars(config) | {"target": ""}))
            for name, (doc, config) in configs.configs().items()
        }
        return plan(tyro.extras.overridable_config_cli(choices, prog="attnjax plan", args=args))
    except (ValueError, NotImplementedError) as error:
        print(f"attnjax plan: {error}", file=sys.stderr)
        return 2


def plan(config: Plan) -> int:
    """Makes and prints a plan; 1 where nothing fits."""
    from experiments.planning import mesh as plan_mesh
    from experiments.planning import program
    from experiments.planning import report as plan_report

    _check(config)
    mesh = plan_mesh.make_mesh(config, config.target)
    if config.longest:
        program.at_length(config, _UNIT)  # raises where a length can't be chosen
    report = plan_report.Report(config, mesh)
    rows, strategies = [], _strategies(config, mesh)
    for strategy in strategies:
        with report.compiling(strategy or ""):
            try:
                rows.append(program.make(config, config.target, mesh, strategy))
            except NotImplementedError as error:
                if len(strategies) == 1:
                    raise
                rows.append(program.refused(strategy, str(error)))
    rows.sort(key=lambda row: (not row.fits, row.seconds, row.memory.get("all", 0)))
    report.show(rows)
    longest = None
    if config.longest:
        best = rows[0].strategy or None
        longest = _longest(config, mesh, best, rows[0], report)
        report.show_longest(longest)
    if config.json:
        data = report.data(rows, longest)
        pathlib.Path(config.json).write_text(json.dumps(data, indent=2) + "\n")
    return 0 if rows[0].fits else 1


def _check(config):
    """Raises ValueError for options of a run that a plan can't honour."""
    if not config.target:
        raise ValueError("--target must say what to compile for, as in --target v5e:4x4")
    wrong = {
        "parallel=pmap": config.parallel == "pmap",
        "cpu_devices": config.cpu_devices,
        "coordinator": config.coordinator,
        "dry_run": config.dry_run,
    }
    for name in (name for name, given in wrong.items() if given):
        raise ValueError(f"{name} isn't for a plan: its devices and hosts are those of --target")


def _strategies(config, mesh):
    """Those to compare; [None] leaves each mechanism its own."""
    from experiments.planning import program

    wanted = config.context_strategies
    if mesh.shape["context"] == 1:
        if wanted is not None:
            raise ValueError("context_strategies need mesh.context > 1, as in --mesh.context 4")
        return [None]
    if config.strategy:
        if wanted is not None:
            raise ValueError("strategy and context_strategies must not both be given")
        return [None]
    known = program.strategies(config)
    for name in (registry.parse_call(text)[0] for text in wanted or ()):
        if name not in known:
            names = ", ".join(known) or "none in common"
            raise ValueError(f"{name!r} isn't a strategy of {', '.join(config.mixers)}: {names}")
    return list(wanted or known) or [None]


def _longest(config, mesh, strategy, start, report):
    """The longest sequence found to fit, by doubling and then halving the gap; None for none."""
    from experiments.planning import program

    unit = _UNIT * mesh.shape["context"]
    fitting, failing = (start, None) if start.fits else (None, start.length)
    while True:
        below = fitting.length if fitting else 0
        if failing is None:
            length = 2 * below
        else:
            length = (below + failing) // 2
            if failing - below <= max(unit, _CLOSE * below):
                return fitting
        length = max(length // unit * unit, unit)
        if length in (below, failing) or length > _MOST:
            return fitting
        try:
            tried = program.at_length(config, length)
            with report.compiling(f"{length:,} tokens"):
                made = program.make(tried, config.target, mesh, strategy)
        except ValueError as error:
            report.say(f"{length:,} tokens: {error}")  # such as: the task has no more
            failing = length
            continue
        fitting, failing = (made, failing) if made.fits else (fitting, length)


if __name__ == "__main__":
    sys.exit(main())
