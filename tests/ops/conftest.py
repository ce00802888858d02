"""Tests of operations go by the rules in the code, whatever the table of this device says."""

import pytest

from pallas_kernels import tables


@pytest.fixture(autouse=True)
def no_table():
    with tables.using(tables.Table("cpu")):
        yield
