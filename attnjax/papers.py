"""Joins the papers of docs/papers.csv with what names them: records, strategies, benchmarks."""

import ast
import csv
import dataclasses
import pathlib
from typing import Literal

from attnjax import parallel
from attnjax.core import registry

_HERE = pathlib.Path(__file__).parent
_TESTS = _HERE.parent / "tests"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One paper, and what the library holds of it.

    The status is "works" where a record, a strategy of `parallel` or a benchmark (by its `PAPERS`)
    names the paper and has a test file, "none" where the library holds nothing of it for the
    `reason` given, and "missing" otherwise.
    """

    key: str
    title: str
    status: Literal["works", "none", "missing"]
    reason: str
    records: tuple[str, ...]
    tests: tuple[str, ...]


def rows() -> list[Row]:
    """Every paper, by key. Imports all records, which takes seconds.

    Raises ValueError where a record names a paper that docs/papers.csv doesn't have.
    """
    entries = _entries()
    named = _records_by_paper([entry["key"] for entry in entries])
    return [_row(entry, named[entry["key"]]) for entry in entries]


def titles() -> dict[str, str]:
    """The title of each paper by its key."""
    return {entry["key"]: entry["title"] for entry in _entries()}


def _entries() -> list[dict[str, str]]:
    with open(_HERE / "papers.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _records_by_paper(keys: list[str]) -> dict[str, list[str]]:
    named = {key: [] for key in keys}
    of_records = {name: registry.get(name).papers for name in registry.names()}
    for name, its in (of_records | parallel.papers() | _benchmarks()).items():
        for key in its:
            if key not in named:
                raise ValueError(f"{name} names no paper: {key!r}{registry.nearest(key, keys)}")
            named[key].append(name)
    return named


def _benchmarks() -> dict[str, tuple[str, ...]]:
    """What each names in `PAPERS`; read, for it stands above this package and isn't imported."""
    found = {}
    for path in sorted((_HERE.parent / "experiments/benchmarks").glob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("PAPERS = "):
                name = f"experiments.benchmarks.{path.stem}"
                found[name] = ast.literal_eval(line.removeprefix("PAPERS = "))
    return found


def _row(entry: dict[str, str], records: list[str]) -> Row:
    tests = tuple(test for test in map(_test_of, records) if _exists(test))
    status = "works" if tests else "none" if entry["reason"] else "missing"
    texts = {field: entry[field] for field in ("key", "title", "reason")}
    return Row(status=status, records=tuple(records), tests=tests, **texts)


def _test_of(record: str) -> str:
    return f"tests/{record.replace('.', '/')}_test.py"


def _exists(test: str) -> bool:
    # An installed copy comes without tests: there the word of the release counts.
    return not _TESTS.is_dir() or (_TESTS.parent / test).is_file()
