"""Every cell of strategy x option is exact or refused with the name of what would work."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from attnjax.parallel import matrix
from tests.parallel import helpers

ROOT = pathlib.Path(__file__).parents[2]
NAMES = [f"{matrix.tables()[number].title}-{name}-{row}" for number, name, row in helpers.CELLS]
TOLERANCE = 1e-5
STRATEGY = re.compile(r"\w+(?:\([^)]*\))?")


@pytest.mark.parametrize("cell", helpers.CELLS, ids=NAMES)
def test_four_devices_equal_one_or_refuse(cell):
    number, strategy, row = cell
    refusal = matrix.tables()[number].refusal(strategy, row)
    if not refusal:
        assert helpers.largest_error(cell, 4) <= TOLERANCE
        return
    with pytest.raises(NotImplementedError, match=re.escape(refusal)):
        helpers.largest_error(cell, 4)
    assert_names_what_works(number, row, refusal, devices=4)


def assert_names_what_works(number, row, refusal, *, devices):
    """Those before the last "can", after the last comma."""
    table = matrix.tables()[number]
    named = [word for word in STRATEGY.findall(refusal.rpartition(", ")[2]) if "_" in word or
             word.partition("(")[0] in table.record.context]  # fmt: skip
    assert named and refusal.endswith(" can")
    for strategy in named:
        assert not table.refusal(strategy, row, devices)


@pytest.mark.parametrize("part", [0, 1])
def test_eight_devices_equal_one_or_refuse(part):
    """In a process of its own: the number of devices of this one is settled."""
    settings = dict(PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
    command = [sys.executable, "-m", "tests.parallel.eight_devices", str(part), "2"]
    run = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    checked, refused = map(int, run.stdout.split())
    assert checked + refused == len(helpers.share(part, 2)) and checked > 80


def test_the_page_is_up_to_date():
    """`make docs` writes it."""
    path = ROOT / "docs/context_parallelism.md"
    assert path.read_text(encoding="utf-8") == matrix.page()
