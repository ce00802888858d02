"""Which implementation and which tiles an operation takes on a kind of device: tables, as data.

Each JSON file beside this one is the table of one kind of device, as JAX names it. A row is for one
operation, one dtype (null is every dtype that has no rows of its own), heads up to a width and
sequences up to a length (null is all that are wider or longer); it names an implementation and its
tiles. Of rows for the same case the first is what is chosen by default, the others hold the tiles
of implementations that are asked for by name. An operation without rows goes by its own rules.

A row says where it comes from, and how much that is worth:

    measured    on this kind of device: the device, its driver, jax's version, the date, and the
                ratio: time of the best other candidate / time of this one
    published   by others, or of other kernels: what, and where it stands
    computed    by a rule that nobody has measured on this device

`attnjax benchmark tune` measures a table and writes it.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import pathlib
import re

import jax

from pallas_kernels.tables.table import Row, Table, case_between, case_of  # noqa: F401

FOLDER = pathlib.Path(__file__).parent
_using = contextvars.ContextVar("table", default=None)


def here() -> Table:
    """The table in force: that of `using`, or of the device that is traced for."""
    return _using.get() or of(device().device_kind)


def device():
    """The device of the mesh that is traced for, or the first of this process."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


@contextlib.contextmanager
def using(table: Table):
    """Traces as on a device with this table; what has been traced before stays as it was."""
    token = _using.set(table)
    try:
        yield
    finally:
        _using.reset(token)


def of(kind: str) -> Table:
    """The table of a kind of device, without rows where none is shipped."""
    table = _using.get()
    return table if table is not None and table.kind == kind else _shipped(kind)


@functools.cache
def _shipped(kind):
    path = path_of(kind)
    return read(path) if path.exists() else Table(kind)


def path_of(kind: str) -> pathlib.Path:
    """The file of a kind of device."""
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '_', kind.lower())}.json"


def read(path: pathlib.Path) -> Table:
    """The table in a file."""
    page = json.loads(path.read_text())
    return Table(page["kind"], page["platform"], tuple(Row(**row) for row in page["rows"]))


def write(path: pathlib.Path, table: Table) -> None:
    """A file that `read` reads, with a line for each row."""
    rows = ",\n".join("  " + json.dumps(dataclasses.asdict(row)) for row in table.rows)
    head = f' "kind": {json.dumps(table.kind)},\n "platform": {json.dumps(table.platform)},\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n{head} "rows": [\n{rows}\n ]\n}}\n')
