"""`attnjax` on the command line: finds the command, runs it, and says in one line what is wrong."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Sequence

import tyro

from attnjax import commands

_DESCRIPTION = """Attention mechanisms in JAX, each checked against the equations of its paper.

Begin with `attnjax list` and `attnjax show NAME`; `attnjax COMMAND --help` explains a command."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model; the same command again resumes the run."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate a trained model."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Measure the time and memory of mechanisms."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare mechanisms trained under one budget, with several seeds."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile a training step for accelerators that aren't here: memory, work and traffic."""


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Try out what a paper claims, at the size of this machine."""


_EXPERIMENTS = {
    "train": Train,
    "evaluate": Evaluate,
    "benchmark": Benchmark,
    "compare": Compare,
    "plan": Plan,
    "reproduce": Reproduce,
}
_COMMANDS = {
    "list": commands.List,
    "show": commands.Show,
    "papers": commands.Papers,
    "zoo": commands.Zoo,
    **_EXPERIMENTS,
}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Runs the command in `argv`, by default the process's arguments; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        if not argv[0].startswith("-"):
            commands.check("command", argv[0], _COMMANDS)
        if argv[0] not in _EXPERIMENTS:
            return _run(argv)
        experiment = _experiment(argv[0])
    except commands.UsageError as error:
        print(f"attnjax: {error}", file=sys.stderr)
        return 2
    return experiment.main(argv[1:])  # it parses the rest, its --help too


def _run(argv: list[str]) -> int:
    command = tyro.extras.subcommand_cli_from_dict(
        _COMMANDS, prog="attnjax", description=_DESCRIPTION, args=argv
    )
    try:
        command.run()
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader has seen enough, as in `attnjax papers --json | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed again at exit
        return 1


def _experiment(name: str):
    try:
        return importlib.import_module(f"experiments.{name}")
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] in ("attnjax", "experiments", "pallas_kernels"):
            raise
        advice = "pip install 'attnjax[experiments]'"
        raise commands.UsageError(f"{name} needs {error.name}: {advice}") from None


if __name__ == "__main__":
    sys.exit(main())
