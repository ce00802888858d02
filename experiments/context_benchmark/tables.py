"""The context-parallel benchmark's rows as a Markdown page."""

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import rich.box
import rich.console
import rich.table

from experiments.planning import report

_HEAD = """\
# Context parallelism {place}

Written by `attnjax benchmark context_parallel`; how to read it: [context_parallel.md]({guide}).
{shapes} {what}
"""
_TIMED = "Times and errors are of the output with all gradients, beside one device's."
_PLANNED = "Nothing was run: what the compiler of the target made of the output with all gradients."


def page(data: dict[str, Any]) -> str:
    """All rows, a table for each function, mask and length."""
    config, target = data["config"], data["target"]
    shapes = (
        f"Batch 1, {config['heads']} heads, {config['kv_heads']} of keys, "
        f"{config['head_dim']} features, {config['dtype']}."
    )
    place = f"compiled for {target}" if target else "on emulated CPU devices"
    what = _PLANNED if target else _TIMED
    parts = [_HEAD.format(place=place, guide="context_parallel.md", shapes=shapes, what=what)]
    line = lambda cells: f"| {' | '.join(cells)} |"
    for title, header, lines in tables(data):
        marked = [[f"`{how}`", *cells] for how, *cells in lines]
        parts += [f"## {title}", "", line(header), "|---" * len(header) + "|"]
        parts += [*map(line, marked), ""]
    return "\n".join(parts)


def tables(data: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, header, lines) for each function, mask and length."""
    columns = _COLUMNS["target" if data["target"] else "cpu"]
    header = ["how", "devices", *columns]
    key = lambda row: (row["function"], row["mask"], row["length"])
    for (function, mask, length), rows in itertools.groupby(data["rows"], key):
        lines = [[how(row), str(row["devices"]), *_cells(row, columns)] for row in rows]
        yield f"{function}, {mask}, {length:,} tokens", header, lines


def how(row: dict[str, Any]) -> str:
    """The strategy of a row, or its implementation on one device."""
    return row["strategy"] or row["implementation"] or "default"


def show(data: dict[str, Any]) -> None:
    """The tables, on the terminal."""
    # for grep: one line a row, whole
    console = rich.console.Console(width=None if sys.stdout.isatty() else 1000, markup=False)
    for title, header, lines in tables(data):
        table = rich.table.Table(*header, title=title, box=rich.box.SIMPLE)
        for cells in lines:
            table.add_row(*cells)
        console.print(table)


def _cells(row, columns):
    if "refused" in row:
        return [f"refused: {row['refused']}", *[""] * (len(columns) - 1)]
    return [show(row) for show in columns.values()]


def _time(row):
    if "not_run" in row:
        return f"not run: {row['not_run']}"
    return f"{row['times_one_device']:.2f} ({1e3 * row['seconds']:.0f} ms)"


def _sent(row):
    kinds = [f"{report.size(n)} {kind}" for kind, n in row["sent"].items() if n]
    return " + ".join(kinds)


def _hidden(row):
    total = sum(row["sent"].values())
    return f"{row['sent_hidden'] / total:.0%}" if total else ""


def _balance(row):
    if row["devices"] == 1:
        return ""
    mark = "*" if row["in_full"] else ""
    return "?" if row["balance"] is None else f"{row['balance']:.2f}{mark}"


def _memory(row):
    return report.size(row["memory"]) + ("" if row["fits"] else ", does not fit")


_temporaries = lambda row: report.size(row["temporaries"])
_error = lambda row: f"{row['error']:.0e}" if "error" in row else ""
_between = lambda row: report.size(row["sent_between_hosts"]) if _hidden(row) else ""
_COLUMNS = {
    "cpu": {
        "time / one device": _time,
        "temporaries": _temporaries,
        "sent": _sent,
        "busiest / mean": _balance,
        "error": _error,
    },
    "target": {
        "memory": _memory,
        "of that temporaries": _temporaries,
        "sent": _sent,
        "of that hidden": _hidden,
        "between hosts": _between,
        "busiest / mean": _balance,
    },
}
