"""Measure this library: every module of experiments/benchmarks is a benchmark.

    attnjax benchmark attention --quick

`attnjax benchmark NAME --help` says what one measures, and its options.
"""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import sys
from collections.abc import Sequence

import tyro

FOLDER = pathlib.Path(__file__).with_name("benchmarks")


def found() -> dict[str, str]:
    """Each benchmark's name and the docstring of its Config, read without importing it."""
    classes = {
        path.stem: [node for node in ast.parse(path.read_text()).body if _is_config(node)]
        for path in sorted(FOLDER.glob("*.py"))
    }
    return {
        name: ast.get_docstring(node) or "" for name, nodes in classes.items() for node in nodes
    }


def _is_config(node):
    return isinstance(node, ast.ClassDef) and node.name == "Config"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a benchmark and gives its exit code; imports that one alone, and none for --help."""
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    choices = {
        name: dataclasses.make_dataclass(name, (), namespace={"__doc__": text})
        for name, text in found().items()
    }
    if argv[0] in choices:
        choices[argv[0]] = load(argv[0]).Config
    config = tyro.extras.subcommand_cli_from_dict(
        choices,
        prog="attnjax benchmark",
        description=inspect.getdoc(sys.modules[__name__]),
        args=argv,
    )
    return load(argv[0]).run(config)


def load(name: str):
    """The module of a benchmark."""
    return importlib.import_module(f"experiments.benchmarks.{name}")


if __name__ == "__main__":
    sys.exit(main())
