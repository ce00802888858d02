"""Writes docs/catalogue.md: every record by family, and every paper with what is held of it."""

import collections
import itertools

from attnjax import papers
from attnjax.core import registry

_HEAD = """# Catalogue

Written by `make docs` from the records and [papers.csv](papers.csv); don't edit it by hand.
A claim is a property that `tests/conformance_test.py` checks for every mechanism that makes it.
"""


def claims(record: registry.Record) -> list[str]:
    """The names of a record's claims, in the order of their definition."""
    made = record.claims if isinstance(record, registry.Mechanism) else ()
    return [claim.name for claim in registry.Claim if claim in made]


def markdown() -> str:
    """The catalogue as one page of markdown. Imports all records."""
    rows = papers.rows()
    return "\n".join([_HEAD, *_claims(), *_families(), *_papers(rows)])


def _claims() -> list[str]:
    return _table("claim", "meaning", rows=[(c.name, c.value) for c in registry.Claim])


def _families() -> list[str]:
    titles = papers.titles()
    lines = []
    for family, names in itertools.groupby(registry.names(), lambda name: name.partition(".")[0]):
        rows = []
        for name in names:
            record = registry.get(name)
            kind = type(record).__name__.lower()
            sources = "; ".join(titles[key] for key in record.papers)
            rows.append((name.partition(".")[2], kind, ", ".join(claims(record)), sources))
        lines += [f"## {family}\n", *_table("name", "kind", "claims", "papers", rows=rows)]
    return lines


def _papers(rows: list[papers.Row]) -> list[str]:
    counts = collections.Counter(row.status for row in rows)
    total = ", ".join(f"{counts[status]} {status}" for status in ("works", "none", "missing"))
    cells = [(r.key, r.title, r.status, ", ".join(r.records) or r.reason) for r in rows]
    table = _table("key", "title", "status", "records, or why there is none", rows=cells)
    return [f"## Papers\n\n{len(rows)} papers: {total}.\n", *table]


def _table(*header: str, rows: list[tuple[str, ...]]) -> list[str]:
    line = lambda cells: f"| {' | '.join(cells)} |"
    return [line(header), line(["---"] * len(header)), *map(line, rows), ""]
