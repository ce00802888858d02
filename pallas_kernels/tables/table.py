"""What a table says: its rows, which of them a case is in, and the tiles of a form."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

_SOURCES = {
    "measured": {"device", "driver", "jax", "date", "ratio"},
    "published": {"what", "where"},
    "computed": {"rule"},
}


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

    def tiles(
        self,
        operation: str,
        rules: Mapping[str, int | None],
        *,
        kernel_for: str | None,
        multiple_of: int = 1,
        **case,
    ) -> dict[str, int | None]:
        """The tiles of the row that `find` gives for a form, and those it doesn't name by `rules`.

        Args:
          rules: {name: size} of all that can be chosen.
          kernel_for: "pallas" for that platform, of which the table of another one says nothing;
            None is "xla".

        Raises ValueError for a row with another name, or with a size that isn't a positive
        `multiple_of`.
        """
        name = "pallas" if kernel_for else "xla"
        row = self.find(operation, implementation=name, **case)
        named = row.tiles if row and kernel_for in (None, self.platform) else {}
        for name, size in named.items():
            if name not in rules:
                known = ", ".join(rules) or "none"
                raise ValueError(f"{name!r} of {row} isn't a size to choose; these are: {known}")
            if size < 1 or size % multiple_of:
                raise ValueError(f"{name}={size} of {row} must be a multiple of {multiple_of} > 0")
        return {**rules, **named}


def case_of(x: jax.Array) -> dict:
    """What `Table.find` asks of tokens (B T N H)."""
    return dict(dtype=x.dtype, head_dim=x.shape[-1], length=x.shape[1])


def case_between(q, k, v) -> dict:
    """What `Table.find` asks of queries (B T N H), keys (B S K H) and values (B S K V)."""
    width, length = max(q.shape[-1], v.shape[-1]), math.sqrt(q.shape[1] * k.shape[1])
    return dict(dtype=jnp.result_type(q, k), head_dim=width, length=length)


def _nearest(rows, name, size):
    """The rows of one class."""
    bound = lambda row: math.inf if getattr(row, name) is None else getattr(row, name)
    bounds = sorted(set(map(bound, rows)))
    chosen = next((x for x in bounds if x >= size), max(bounds, default=None))
    return [row for row in rows if bound(row) == chosen]
