"""What the commands of `attnjax` print: the library's records, its papers and its trained models.

jax takes seconds to import, so a command imports what it needs when it runs, and `--help` needs
none of it. The docstrings are the help that a user reads.
"""

import dataclasses
import difflib
import inspect
import json
import re
import sys
from collections.abc import Callable, Collection
from typing import Annotated

import tyro

_QUALIFIER = re.compile(r"(?<!['\"\w])([A-Za-z_]\w*\.)+(?=\w)")  # "jaxtyping." of a type's name


class UsageError(Exception):
    """What was typed can't be done; the message is all that its writer needs to see."""


@dataclasses.dataclass(frozen=True)
class List:
    """List every mechanism, intervention, objective, probe and task, with its claims."""

    family: Annotated[str | None, tyro.conf.arg(metavar="FAMILY")] = None
    """Only this family, as in `softmax`."""
    claim: Annotated[str | None, tyro.conf.arg(metavar="CLAIM")] = None
    """Only mechanisms that make this claim, as in `streamable`."""

    def run(self) -> None:
        from attnjax import catalogue
        from attnjax.core import registry

        names = registry.names()
        if self.family is not None:
            check("family", self.family, {name.partition(".")[0] for name in names})
            names = [name for name in names if name.startswith(f"{self.family}.")]
        wanted = self.claim and self.claim.lower()
        if wanted is not None:
            check("claim", wanted, [claim.name.lower() for claim in registry.Claim])
        rows = []
        for name in names:
            record = registry.get(name)
            claims = [claim.lower() for claim in catalogue.claims(record)]
            if wanted is None or wanted in claims:
                rows.append((name, type(record).__name__.lower(), ", ".join(claims)))
        _print_table("name", "kind", "claims", rows=rows)


@dataclasses.dataclass(frozen=True)
class Show:
    """Show one record: its equations, claims, papers, arguments and options."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """`family.name` as `attnjax list` prints it, or `name` alone."""

    def run(self) -> None:
        from attnjax import catalogue, papers
        from attnjax.core import registry

        try:
            full_name = registry.full_name(self.name)
        except ValueError as error:
            raise UsageError(f"{error}; see `attnjax list`") from None
        record, titles = registry.get(full_name), papers.titles()
        claims = [(name.lower(), registry.Claim[name].value) for name in catalogue.claims(record)]
        tables = {("claim", "meaning"): claims}
        tables["paper", "title"] = [(key, titles[key]) for key in record.papers]
        tables[f"{record.fn.__name__} takes", "default"] = _arguments(record.fn)
        if isinstance(record, registry.Mechanism):
            options = _arguments(record.module, hidden=("parent", "name"))  # as every module has
            tables[f"{record.module.__name__} takes", "default"] = options
        print(f"{full_name}\n\n{sys.modules[f'attnjax.{full_name}'].__doc__.strip()}")
        for header, rows in tables.items():
            if rows:
                _print_table(*header, rows=rows)


@dataclasses.dataclass(frozen=True)
class Papers:
    """List every paper with what the library holds of it: works, none (and why), or missing."""

    json: bool = False
    """Print a JSON list of objects."""
    markdown: bool = False
    """Print docs/catalogue.md: the records by family, then the papers."""

    def run(self) -> None:
        from attnjax import catalogue, papers

        if self.json and self.markdown:
            raise UsageError("--json and --markdown exclude each other")
        if self.markdown:
            print(catalogue.markdown(), end="")
        elif self.json:
            print(json.dumps([dataclasses.asdict(row) for row in papers.rows()], indent=2))
        else:
            rows = [
                (r.key, r.title, r.status, ", ".join(r.records) or r.reason, ", ".join(r.tests))
                for r in papers.rows()
            ]
            _print_table("key", "title", "status", "records, or why none", "tests", rows=rows)


@dataclasses.dataclass(frozen=True)
class ZooList:
    """List the trained models with their measured metrics."""

    pattern: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[PATTERN]")] = "*"
    """Only models whose name matches, as in `'gla-*'`."""

    def run(self) -> None:
        rows = []
        for card in _cards(self.pattern):
            metrics = [f"{k} {m['mean']:.4g}" for k, m in card.metrics.items()]
            rows.append((card.name, f"{card.parameters:,}", ", ".join(metrics), card.licence))
        _print_table("name", "parameters", "metrics, mean over seeds", "licence", rows=rows)


@dataclasses.dataclass(frozen=True)
class ZooShow:
    """Show a trained model's card: what it is, how it was trained, and how well it does."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """As `attnjax zoo list` prints it."""

    def run(self) -> None:
        cards = {card.name: card for card in _cards("*")}
        check("trained model", self.name, cards)
        card = dataclasses.asdict(cards[self.name])
        del card["sha256"]  # one line for each array
        _print_table("field", "value", rows=[(k, json.dumps(v)) for k, v in card.items()])


@dataclasses.dataclass(frozen=True)
class Zoo:
    """List or show trained models; `attnjax.zoo.load(NAME)` loads one."""

    action: tyro.conf.OmitArgPrefixes[
        tyro.conf.OmitSubcommandPrefixes[
            Annotated[ZooList, tyro.conf.subcommand("list")]
            | Annotated[ZooShow, tyro.conf.subcommand("show")]
        ]
    ]

    def run(self) -> None:
        self.action.run()


def check(what: str, word: str, choices: Collection[str]) -> None:
    """Raises UsageError, naming the nearest choice, where `word` is none of them."""
    if word not in choices:
        nearest = difflib.get_close_matches(word.lower(), choices, n=1, cutoff=0)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UsageError(f"no {what} is called {word!r}{hint}")


def _cards(pattern: str):
    from attnjax import zoo

    try:
        return zoo.list(pattern)
    except (ValueError, zoo.CheckpointCorrupted) as error:
        raise UsageError(error) from None


def _arguments(function: Callable, hidden: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    rows = []
    for parameter in inspect.signature(function).parameters.values():
        default = parameter.default
        text = "" if default is parameter.empty else getattr(default, "__name__", repr(default))
        typed = _QUALIFIER.sub("", str(parameter.replace(default=parameter.empty)))
        rows += [(typed, text)] if parameter.name not in hidden else []
    return rows


def _print_table(*header: str, rows: list[tuple[str, ...]]) -> None:
    import rich.box
    import rich.console
    import rich.table

    table = rich.table.Table(box=rich.box.SIMPLE)
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 1000  # for grep: one line a row, whole
    rich.console.Console(width=width, markup=False, highlight=False).print(table)
