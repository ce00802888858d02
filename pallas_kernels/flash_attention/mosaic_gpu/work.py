"""What a warpgroup does with its share of a tile."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.mosaic_gpu.frame import Frame, Place
from pallas_kernels.flash_attention.mosaic_gpu.part import Part
from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import ROWS, Steps
from pallas_kernels.flash_attention.mosaic_gpu.walk import Walk


class Inputs(NamedTuple):
    """What a kernel reads, by name: arrays, outside of it, or references.

    kept: parts that a warpgroup has throughout.
    fetched: those that steps need, by the barrier that says so.
    others: any tree, which stays in global memory.
    """

    kept: dict[str, Part]
    fetched: tuple[dict[str, Part], ...]
    others: Any


class Shared(NamedTuple):
    """Shared memory, and the barriers that say when it may be read and written."""

    kept: dict
    ring: tuple[dict, ...]
    scratch: dict
    arrived: Any  # what is kept
    ready: tuple  # each part of a stage
    free: Any  # a stage


@dataclasses.dataclass(frozen=True)
class Work:
    """Where a warpgroup is, and what it sees."""

    frame: Frame
    walk: Walk
    tables: tuple
    steps: Steps
    inputs: Inputs
    shared: Shared
    block: tuple  # batch, head and tile
    group: Any

    @property
    def place(self) -> Place:
        """Where it begins, but for columns."""
        return self.frame.first(self.block)

    @property
    def kept(self) -> dict:
        """Its parts that are kept."""
        return {name: x.at[self.group] for name, x in self.shared.kept.items()}

    def scratch(self, name: str):
        """Its own scratch."""
        return self.shared.scratch[name].at[self.group]

    def keep(self):
        """Reads the parts that are kept."""
        arrived = self.shared.arrived.at[self.group]
        for name, x in self.inputs.kept.items():
            part = x.of(self.place, self.steps.size, self.group)
            plgpu.copy_gmem_to_smem(part, self.kept[name], arrived)
        plgpu.barrier_wait(arrived)

    def fetch(self):
        """Fetches all steps."""

        def visit(_, step, partial):
            begin = step.place.column()  # which is on its way while the stage isn't free
            place = step.place._replace(column=lambda: begin)
            plgpu.barrier_wait(step.free)
            for i, parts in enumerate(self.inputs.fetched):
                ready = self.shared.ready[i].at[step.stage]
                for name, x in parts.items():
                    memory = self.shared.ring[i][name].at[step.stage]
                    x.fetch(place, self.steps.size, memory, ready)
            return ()

        self._each(visit, ())
        for stage in range(self.steps.stages):  # every phase of a barrier is to be waited for
            plgpu.barrier_wait(self.shared.free.at[stage])

    def each(self, visit: Callable, carry):
        """`carry = visit(carry, step, partial)` for all steps."""
        for stage in range(self.steps.stages):
            plgpu.barrier_arrive(self.shared.free.at[stage])

        def release(carry, step, partial):
            carry = visit(carry, step, partial)
            plgpu.barrier_arrive(step.free)
            return carry

        return self._each(release, carry)

    def write(self, *staged):
        """Copies its parts of outputs, pairs of shared memory and the output, to where they go."""
        plgpu.commit_smem()
        for memory, output in staged:
            part = output.of(self.place, self.steps.size, self.group)
            plgpu.copy_smem_to_gmem(memory, part)
        plgpu.wait_smem_to_gmem(0)

    def _each(self, visit, carry):
        def count(carry, place, partial):
            number, inner = carry
            stage = lax.rem(number, self.steps.stages)
            return number + 1, visit(inner, Step(self, place, stage), partial)

        carry = jnp.int32(0), carry
        return self.frame.each(self.walk, self.tables, self.block, count, carry)[1]


@dataclasses.dataclass(frozen=True)
class Step:
    """Columns that a warpgroup meets."""

    work: Work
    place: Place
    stage: Any

    @property
    def begin(self) -> tuple:
        """Its first row and column."""
        return self.place.row + self.work.group * ROWS, self.place.column()

    @property
    def free(self):
        """The barrier that says that the stage may be written."""
        return self.work.shared.free.at[self.stage]

    def ready(self, i: int) -> dict:
        """What is kept, and what was fetched by the i-th barrier, when it is there.

        What lies across is turned: it has rows for columns of the tile, as everything else.
        """
        work = self.work
        plgpu.barrier_wait(work.shared.ready[i].at[self.stage])
        found = work.kept
        for name, part in work.inputs.fetched[i].items():
            x = work.shared.ring[i][name].at[self.stage]
            found[name] = x.at[work.group] if 0 in part.axes else x.T if part.across else x
        return found
