"""Train what a paper claims at the size of this machine, and say whether the numbers agree.

    attnjax reproduce                             which claims there are
    attnjax reproduce icl_regression              minutes; writes what it found as JSON
    attnjax reproduce icl_regression --dim 5 --num-examples 20

A reproduction is a file of experiments/reproductions with a `Config` and a `run`.
"""

import dataclasses
import importlib
import inspect
import json
import pathlib
import pkgutil
import platform
import sys
import time
from collections.abc import Sequence

import jax
import rich.console
import rich.table
import tyro

from attnjax import commands
from experiments import config as configs
from experiments import reproductions
from experiments.measuring import results


@dataclasses.dataclass(frozen=True)
class Output:
    """Where it goes."""

    out: pathlib.Path = configs.ROOT / "docs/reproductions"
    """Folder of the JSON files and of README.md, which shows all of them."""


def names() -> list[str]:
    """The reproductions that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(reproductions.__path__))


def load(name: str):
    """The module of a reproduction; UsageError, naming the nearest, where there is none."""
    commands.check("reproduction", name, names())
    return importlib.import_module(f"experiments.reproductions.{name}")


def main(argv: Sequence[str] | None = None) -> int:
    """0 where all findings agree with their paper, 1 where one doesn't, 2 for bad input."""
    name, *options = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        for each in names():
            print(f"{each:20} {_headline(load(each))}")
        return 0
    try:
        module = load(name)
    except commands.UsageError as error:
        print(f"attnjax reproduce: {error}", file=sys.stderr)
        return 2
    config, output = tyro.cli(
        tuple[module.Config, Output],
        prog=f"attnjax reproduce {name}",
        description=inspect.getdoc(module),
        args=options,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    start = time.perf_counter()
    findings = module.run(config)
    seconds = time.perf_counter() - start
    show(name, findings)
    write(name, config, findings, seconds, output.out)
    return 0 if all(finding.agrees for finding in findings) else 1


def _headline(module) -> str:
    return inspect.getdoc(module).partition("\n")[0]


def show(name, findings) -> None:
    """The findings as a table on the terminal."""
    table = rich.table.Table("claim", "expected", "seen", "agrees", title=name)
    for finding in findings:
        agrees = "yes" if finding.agrees else "[red]no"
        table.add_row(finding.claim, finding.expected, finding.seen, agrees)
    rich.console.Console().print(table)


def write(name, config, findings, seconds, out: pathlib.Path) -> None:
    """NAME.json, and README.md anew from all JSON files of the folder."""
    out.mkdir(parents=True, exist_ok=True)
    page = {
        "name": name,
        "about": _headline(load(name)),
        "command": f"attnjax reproduce {name}",
        "config": dataclasses.asdict(config),
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "minutes": round(seconds / 60, 1),
        "machine": results.machine(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    (out / f"{name}.json").write_text(json.dumps(page, indent=1) + "\n")
    pages = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    (out / "README.md").write_text(markdown(pages))
    print(f"wrote {out / name}.json and README.md")


def markdown(pages) -> str:
    """All findings as a page."""
    lines = [
        "# Claims of papers, tried out",
        "",
        "Each at a size that trains in minutes on two cores; written by `attnjax reproduce NAME`.",
    ]
    for page in pages:
        lines += ["", f"## {page['name']}", "", page["about"], ""]
        lines += [f"`{page['command']}`: {page['minutes']} minutes on {page['machine']['cores']} "
                  f"cores, jax {page['versions']['jax']}.", ""]  # fmt: skip
        lines += ["| claim | expected | seen | agrees |", "| --- | --- | --- | --- |"]
        for x in page["findings"]:
            cells = [x[name].replace("|", "\\|") for name in ("claim", "expected", "seen")]
            lines.append(f"| {' | '.join(cells)} | {'yes' if x['agrees'] else '**no**'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
