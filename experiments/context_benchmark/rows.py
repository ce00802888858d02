"""Rows of the context-parallel benchmark: each cell compiled, and on this machine run and timed."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments.context_benchmark import cells as context_cells
from experiments.context_benchmark import counts
from experiments.measuring import turns
from experiments.planning import accelerators


@dataclasses.dataclass(frozen=True)
class Place:
    """Where cells are compiled, and whether they are run."""

    devices: Sequence[jax.Device]
    sizes: context_cells.Sizes
    target: str = ""  # whose compiler is asked; "" is this machine, where cells are run too
    runs: int = 0  # of each, after one that isn't counted
    gigabytes: float = 0.0  # of temporaries on all devices: what needs more isn't run

    def compiled(self, cell: context_cells.Cell) -> tuple[dict[str, Any], Callable | None]:
        """(the row of a cell, what runs it and gives its output and gradients if it may be run)."""
        row = dataclasses.asdict(cell)
        if scores := self._too_many_scores(cell):
            return row | {"refused": f"its scores alone would take {scores / 1e9:.1f} GB"}, None
        try:
            program = context_cells.Program.of(cell, self.sizes, self.devices)
            step = program.compile(self.target)
        except NotImplementedError as error:
            return row | {"refused": str(error)}, None
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return row | {"refused": str(error).strip().splitlines()[0]}, None
        row |= counts.of(step, self._islands(cell))
        if self.target:
            room = accelerators.of_target(self.target).memory
            return row | {"fits": row["memory"] <= room}, None
        needs = row["temporaries"] * cell.devices / 1e9
        if needs > self.gigabytes:
            return row | {"not_run": f"its temporaries would take {needs:.1f} GB"}, None
        args = program.put(context_cells.arguments(cell, self.sizes))
        return row, lambda: jax.block_until_ready(step(*args))

    def _too_many_scores(self, cell):
        """Bytes of a whole matrix of scores that can't be had; its mask would be made here."""
        dtype = np.dtype(self.sizes.dtype)
        scores = self.sizes.heads * cell.length**2 * dtype.itemsize
        room = self.gigabytes * 1e9
        if self.target:
            room = accelerators.of_target(self.target).memory
        return scores if cell.implementation == "dense" and scores > room else 0

    def _islands(self, cell):
        """Of each device, its host, where a slower network is between hosts."""
        apart = self.target and accelerators.of_target(self.target).network
        return [d.process_index if apart else 0 for d in self.devices[: cell.devices]]


def of(
    cells: Sequence[context_cells.Cell], place: Place, advance: Callable[[], None]
) -> list[dict[str, Any]]:
    """Rows of cells that compute the same, which take turns; the first is what they should give.

    `advance` is called after each is compiled. A row has numbers, or says in `refused` or `not_run`
    why there are none.
    """
    rows, steps = [], []
    for cell in cells:
        row, step = place.compiled(cell)
        rows.append(row)
        steps.append(step)
        advance()
    run = {number: step for number, step in enumerate(steps) if step is not None}
    whole = 0 in run
    for number, values in (_measured(run, place.runs) if whole else {}).items():
        rows[number] |= values
    for number in {} if whole else run:
        rows[number]["not_run"] = "there is nothing to compare it to"
    return rows


def _measured(run, runs):
    """{number: seconds, their ratio to those of number 0, and the error beside its numbers}."""
    entries = {number: _entry(step) for number, step in run.items()}
    times, refused = turns.take_turns(entries, runs=runs, seconds=0.0)
    if refused:
        raise RuntimeError(f"what was compiled must run: {refused}")
    medians = {number: statistics.median(x) for number, x in times.items()}
    expected = _on_host(run[0])
    return {
        number: {
            "seconds": medians[number],
            "times_one_device": medians[number] / medians[0],
            "error": largest_error(_on_host(step), expected),
        }
        for number, step in run.items()
    }


def _entry(step):
    def seconds(calls):
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - start) / calls

    return turns.Entry(prepare=lambda: seconds, work=0.0)


def _on_host(step):
    return [np.asarray(x, np.float64) for x in jax.device_get(jax.tree.leaves(step()))]


def largest_error(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Of outputs and gradients, each relative to the norm of what is expected."""
    pairs = zip(actual, expected, strict=True)
    norm = np.linalg.norm
    return max(float(norm(a - b) / max(norm(b), 1e-30)) for a, b in pairs)
