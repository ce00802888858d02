"""What an operation could take on the device at hand: candidates for who measures them.

A candidate is traced with a table that has it as its only row: what is measured is what that row
would do. `attnjax benchmark tune` measures, and writes the rows of those that were fastest.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from pallas_kernels import tables
from pallas_kernels.decay_attention import decay_attention
from pallas_kernels.linear_recurrence import linear_recurrence
from pallas_kernels.selective_scan import selective_scan


class Candidate(NamedTuple):
    """An implementation with tiles, which are (name, size) each."""

    implementation: str
    tiles: tuple[tuple[str, int], ...] = ()

    def __str__(self):
        return " ".join([self.implementation, *(f"{name}={size}" for name, size in self.tiles)])


@dataclasses.dataclass(frozen=True)
class Case:
    """One class of arguments of an operation: queries, keys and values of one sequence."""

    operation: str
    dtype: str
    head_dim: int
    length: int

    def __str__(self):
        return f"{self.operation} {self.dtype}, D {self.head_dim}, T {self.length}"


def _squares(*sizes):
    return [Candidate("pallas", (("block_q", x), ("block_k", x))) for x in sizes]


def _recurrent(*chunks):
    """XLA's form and the kernel, which refuses chunks that it can't."""
    by = {x: [Candidate(x, (("chunk", size),)) for size in chunks] for x in ("xla", "pallas")}
    both = by["xla"] + by["pallas"]
    return {"cpu": by["xla"], "cuda": both, "tpu": both}


_BLOCKED = [Candidate("blocked", (("block", x),)) for x in (512, 128, 256, 1024)]
_COLUMNS = [Candidate("pallas", (("block_k", x),)) for x in (128, 64, 32)]
_CANDIDATES = {
    "linear_recurrence": _recurrent(64, 32, 128),
    "decay_attention": _recurrent(128, 64, 256),
    "selective_scan": _recurrent(64, 32, 128),
    "dot_product_attention": {
        "cpu": [Candidate("dense"), *_BLOCKED],
        "cuda": [Candidate("dense"), *_BLOCKED, Candidate("cudnn"), *_COLUMNS],
        "tpu": [Candidate("dense"), *_BLOCKED, *_squares(1024, 512, 256, 2048)],
    },
}


def _recurrence(channels):
    """With a decay of 0.1 a token, of each head or of each channel."""

    def call(q, k, v):
        decay = jnp.full((1, 1, q.shape[2], q.shape[3] if channels else 1), -0.1)
        return linear_recurrence(q, k, v, log_decay=decay)[0]

    return call


def _decay(q, k, v):
    """With a decay of 0.1 a token."""
    return decay_attention(q, k, v, jnp.full(q.shape[2], -0.1))[0]


def _scan(x, delta, v):
    """With 16 states a channel, as most models have."""
    b, c = delta[..., :16], v[..., :16]
    rate, skip = jnp.full((*x.shape[2:], b.shape[-1]), -1.0), jnp.ones(x.shape[2:])
    return selective_scan(x, jax.nn.softplus(delta), rate, b, c, skip)[0]


_CALLS = {
    "linear_recurrence": {"heads": _recurrence(False), "channels": _recurrence(True)},
    "decay_attention": {"causal": _decay},
    "selective_scan": {"causal": _scan},
    "dot_product_attention": {
        "full": ops.dot_product_attention,
        "causal": lambda q, k, v: ops.dot_product_attention(q, k, v, mask=masks.Causal()),
    },
}
OPERATIONS = tuple(_CALLS)


def candidates(case: Case) -> list[Candidate]:
    """What there is on the platform at hand; today's rules come first of their implementation."""
    return _CANDIDATES[case.operation][_platform()]


def _platform():
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


def steps(case: Case, candidate: Candidate) -> dict[str, Callable]:
    """{name: (q, k, v, cotangent) -> gradients}, each with the candidate in force."""
    table = tables.Table(
        kind(), _platform(), (row(case, candidate, {"how": "computed", "rule": ""}),)
    )

    def step(call):
        def gradients(*arrays):
            with tables.using(table):
                return jax.vjp(call, *arrays[:3])[1](arrays[3])

        return gradients

    return {name: step(call) for name, call in _CALLS[case.operation].items()}


def arrays(case: Case, heads: int) -> tuple[jax.Array, ...]:
    """What a step takes, of shape (1 T N H) each."""
    shape = 1, case.length, heads, case.head_dim
    return tuple(jax.random.normal(jax.random.key(i), shape, case.dtype) for i in range(4))


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
