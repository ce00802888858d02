"""What an operation could take on the device at hand: candidates for who measures them.

A candidate is traced with a table that has it as the operation's only row: what is measured is
what that row would do. `attnjax benchmark tune` measures, and writes the rows of those that were
fastest. `tuning_candidates` lists them, `tuning_calls` says what is called.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import jax

from attnjax.ops.tuning_calls import CALLS
from attnjax.ops.tuning_candidates import CANDIDATES, Candidate
from pallas_kernels import tables

OPERATIONS = tuple(CALLS)


@dataclasses.dataclass(frozen=True)
class Case:
    """One class of arguments of an operation, as a row of a table is for."""

    operation: str
    dtype: str
    head_dim: int
    length: int

    def __str__(self):
        return f"{self.operation} {self.dtype}, D {self.head_dim}, T {self.length}"


def candidates(case: Case) -> list[Candidate]:
    """What there is on the platform at hand; today's rules come first of their implementation."""
    return CANDIDATES[case.operation][_platform()]


def _platform():
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


def steps(case: Case, candidate: Candidate) -> dict[str, Callable]:
    """{name: function of `arrays`}, each with the candidate in force.

    They return gradients, or of what has none the output. Other operations, by which this one may
    be computed, go by the table in force.
    """
    own = row(case, candidate, {"how": "computed", "rule": ""})
    others = (x for x in tables.here().rows if x.operation != case.operation)
    table, calls = tables.Table(kind(), _platform(), (own, *others)), CALLS[case.operation]

    def step(call):
        def run(*arrays):
            with tables.using(table):
                if not calls.learned:
                    return call(*arrays)
                *arrays, cotangent = arrays
                return jax.vjp(call, *arrays)[1](cotangent)

        return run

    return {name: step(call) for name, call in calls.by_name.items()}


def arrays(case: Case, heads: int) -> tuple:
    """What a step takes; in the order of its arguments, with a cotangent where it is learned."""
    return CALLS[case.operation].draw(case.dtype, case.head_dim, case.length, heads)


def row(case: Case, candidate: Candidate, source: dict) -> tables.Row:
    """The row of a table that says to take the candidate."""
    return tables.Row(
        **dataclasses.asdict(case),
        implementation=candidate.implementation,
        tiles=dict(candidate.tiles),
        source=source,
    )


def chosen(case: Case) -> Candidate | None:
    """What the table in force says; None where it has no row for the case."""
    case = dataclasses.asdict(case)
    found = tables.here().find(case.pop("operation"), **case)
    return found and Candidate(found.implementation, tuple(found.tiles.items()))


def kind() -> str:
    """The kind of device that programs are traced for."""
    return tables.device().device_kind


def write(rows: list[tables.Row], out: pathlib.Path | None = None) -> pathlib.Path:
    """Writes the table in force with these rows in it; None is to the file that is shipped.

    Rows of an operation, dtype and width of heads replace all that there were of the three.
    """
    about = lambda row: (row.operation, row.dtype, row.head_dim)
    renewed = set(map(about, rows))
    kept = [row for row in tables.here().rows if about(row) not in renewed]
    path = out or tables.path_of(kind())
    tables.write(path, tables.Table(kind(), _platform(), (*rows, *kept)))
    return path
