"""Every cell of strategy x option is exact or refused with the name of what would work."""

import pathlib
import subprocess
import sys

import pytest

from attnjax.parallel import matrix
from tests.parallel import cells

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("cell", cells.CELLS, ids=str)
def test_four_devices_equal_one_or_refuse(cell):
    cells.refused(cell, 4)


def test_eight_devices_equal_one_or_refuse():
    """In a process of its own: the number of devices of this one is settled."""
    command = [sys.executable, "-m", "tests.parallel.eight_devices"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    exact, refused = map(int, run.stdout.split())
    assert exact + refused == sum(len(x.strategies) * len(x.rows) for x in matrix.tables())
    assert exact > 170


def test_cells_have_every_row_once():
    expected = [
        (x.title, name, row) for x in matrix.tables() for name in x.strategies for row in x.rows
    ]
    found = [(cell.table.title, cell.strategy, row) for cell in cells.CELLS for row in cell.rows]
    assert sorted(found) == sorted(expected)


def test_rows_that_differ_are_not_one_call():
    with pytest.raises(ValueError, match="K differs in one key head, heads that don't divide"):
        matrix.tables()[0].arguments("one key head", "heads that don't divide")


def test_the_page_is_up_to_date():
    """`make docs` writes it."""
    path = ROOT / "docs/context_parallelism.md"
    assert path.read_text(encoding="utf-8") == matrix.page()
