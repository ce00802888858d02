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
import math
import pathlib
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

FOLDER = pathlib.Path(__file__).parent
_SOURCES = {
    "measured": {"device", "driver", "jax", "date", "ratio"},
    "published": {"what", "where"},
    "computed": {"rule"},
}
_using = contextvars.ContextVar("table", default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What is chosen for one operation and one class of its arguments.

    Raises ValueError for a source that isn't said to be measured, published or computed, or that
    lacks what such a source must say.
    """

    operation: str
    implementation: str
    dtype: str | None = None
    head_dim: int | None = None
    length: int | None = None
    tiles: Mapping[str, int] = dataclasses.field(default_factory=dict)
    source: Mapping[str, object]

    def __post_init__(self):
        how = self.source.get("how")
        if how not in _SOURCES:
            raise ValueError(f"source of {self} must have a `how` of {list(_SOURCES)}")
        if missing := _SOURCES[how] - self.source.keys():
            raise ValueError(f"{self} is {how}, so its source must say {sorted(missing)}")


@dataclasses.dataclass(frozen=True)
class Table:
    """All rows of a kind of device, and the platform that programs are lowered for there."""

    kind: str
    platform: str | None = None  # "cpu", "tpu" or "cuda"; None where nothing is known of the kind
    rows: tuple[Row, ...] = ()

    def find(
        self,
        operation: str,
        *,
        dtype,
        head_dim: int,
        length: int | float,
        implementation: str | None = None,
    ) -> Row | None:
        """The first row of the class that these arguments are in, of `implementation` if given.

        A size is in the smallest class that holds it, or in the largest that there is. length is
        the geometric mean where queries and keys differ. None where there are no such rows.
        """
        rows = [row for row in self.rows if row.operation == operation]
        rows = [row for row in rows if implementation in (None, row.implementation)]
        dtype = jnp.dtype(dtype).name
        rows = [x for x in rows if x.dtype == dtype] or [x for x in rows if x.dtype is None]
        rows = _nearest(_nearest(rows, "head_dim", head_dim), "length", length)
        return rows[0] if rows else None

    def tile(self, name: str, rule: int | None, operation: str, **case) -> int | None:
        """The tile `name` of the row that `find` gives for a case; without one, as `rule` says."""
        row = self.find(operation, **case)
        return rule if row is None else row.tiles.get(name, rule)


def case_of(x: jax.Array) -> dict:
    """What `Table.find` asks of tokens (B T N H)."""
    return dict(dtype=x.dtype, head_dim=x.shape[-1], length=x.shape[1])


def _nearest(rows, name, size):
    """The rows of one class."""
    bound = lambda row: math.inf if getattr(row, name) is None else getattr(row, name)
    bounds = sorted(set(map(bound, rows)))
    chosen = next((x for x in bounds if x >= size), max(bounds, default=None))
    return [row for row in rows if bound(row) == chosen]


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
