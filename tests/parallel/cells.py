"""Cells of `parallel.matrix`, and whether each equals one device or is refused.

Rows that ask for different things are run in one call, which has all that is particular about
them: a strategy that gets one of them wrong gets the call wrong.
"""

import functools
import re
from typing import NamedTuple

import jax
import numpy as np
import pytest

from attnjax import parallel
from attnjax.parallel import matrix
from tests.parallel import helpers

TOLERANCE = 1e-5
STRATEGY = re.compile(r"\w+(?:\([^)]*\))?")

# by title; each other row is a call of its own
TOGETHER = {
    "Softmax attention": (
        (
            "one key head for each query head",
            "documents and padding",
            "any mask, by head",
            "bias of keys",
            "sinks, scale and softcap",
        ),
        ("one key head", "window on both sides", "bias", "dropout", "score_mod"),
        ("lengths that don't divide", "sliding window"),
        ("heads that don't divide", "fewer tokens than devices", "prefix"),
        ("fewer key heads than devices", "neighborhood in an image", "implementation"),
    ),
    "Recurrences with a decay": (
        ("causal", "state in and out"),
        ("documents and padding", "heads that don't divide"),
        ("lengths that don't divide", "state of a length that doesn't divide"),
    ),
    "Blocks of keys that a gate chose": (
        (
            "padding, and a length that doesn't divide",
            "the gate's own loss",
            "queries that share a choice",
        ),
    ),
    "Neighborhoods": (("one axis", "strides, and a length that doesn't divide"),),
}


class Cell(NamedTuple):
    """Some rows of a table for one strategy."""

    number: int  # of the table
    strategy: str
    rows: tuple[str, ...]

    @property
    def table(self):
        return matrix.tables()[self.number]

    def __str__(self):
        return f"{self.table.title}-{self.strategy}-{', '.join(self.rows)}"


def _calls(table):
    together = TOGETHER.get(table.title, ())
    alone = [(row,) for row in table.rows if not any(row in rows for rows in together)]
    return (*together, *alone)


CELLS = [
    Cell(number, strategy, rows)
    for number, table in enumerate(matrix.tables())
    for rows in _calls(table)
    for strategy in table.strategies
]


def refused(cell, devices):
    """The rows that are refused; asserts that the others equal one device."""
    found = ()
    try:
        error = _largest_error(cell, devices)
    except NotImplementedError:
        found = tuple(row for row in cell.rows if _is_refused(cell, row, devices))
        assert found, f"{cell}: all rows at once are refused, and none alone"
        left = tuple(row for row in cell.rows if row not in found)
        error = _largest_error(cell._replace(rows=left), devices) if left else 0.0
    assert error <= TOLERANCE, f"{cell}: {error}"
    return found


def _is_refused(cell, row, devices):
    refusal = cell.table.refusal(cell.strategy, row, devices)
    if refusal:
        with pytest.raises(NotImplementedError, match=re.escape(refusal)):
            _largest_error(cell._replace(rows=(row,)), devices)
        _assert_names_what_works(cell.table, row, refusal, devices)
    return bool(refusal)


def _assert_names_what_works(table, row, refusal, devices):
    """Those before the last "can", after the last comma."""
    named = [word for word in STRATEGY.findall(refusal.rpartition(", ")[2]) if "_" in word or
             word.partition("(")[0] in table.record.context]  # fmt: skip
    assert named and refusal.endswith(" can"), refusal
    for strategy in named:
        assert not table.refusal(strategy, row, devices), refusal


def _largest_error(cell, devices):
    """Of outputs and gradients, relative to one device's."""
    run = parallel.shard(cell.strategy, cell.table.record, helpers.mesh(context=devices))
    pairs = zip(_run(run, cell), _on_one(cell.number, cell.rows), strict=True)
    # in numpy, as JAX would compile each of these operations for each shape
    norm = lambda x: np.linalg.norm(x.astype(np.float32).reshape(-1))
    return max(float(norm(a - b) / max(norm(b), 1e-30)) for a, b in pairs)


@functools.cache
def _on_one(number, rows):
    """Kept for all strategies, whose cells follow one another."""
    return _run(matrix.tables()[number].record.fn, Cell(number, "", rows))


def _run(fn, cell):
    """Outputs and gradients of `fn`."""
    arrays, options = cell.table.arguments(*cell.rows)
    by_name = lambda *xs: fn(**dict(zip(arrays, xs, strict=True)), **options)
    given = jax.device_get(list(arrays.values()))  # else JAX compiles how they are cut
    return jax.device_get(jax.tree.leaves(helpers.with_gradients(by_name)(*given)))
