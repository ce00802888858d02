"""What a warpgroup does with its share of a tile."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.mosaic_gpu.tile_sizes import ROWS, TILE, Steps
from pallas_kernels.flash_attention.mosaic_gpu.walk import Walk


class Inputs(NamedTuple):
    """What a kernel reads: arrays (B L heads F) or (B heads L), outside of it or references.

    kept: of which a tile is kept.
    fetched: of which steps are fetched, by the barrier that says so.
    others: any tree, which stays in global memory.
    """

    kept: tuple
    fetched: tuple
    others: Any


class Shared(NamedTuple):
    """Shared memory, and the barriers that say when it may be read and written."""

    kept: tuple
    ring: tuple
    scratch: tuple
    arrived: Any  # what is kept
    ready: tuple  # each part of a stage
    free: Any  # a stage


@dataclasses.dataclass(frozen=True)
class Work:
    """Where a warpgroup is, and what it sees."""

    walk: Walk
    tables: tuple
    steps: Steps
    inputs: Inputs
    shared: Shared
    b: Any
    head: Any
    tile: Any
    group: Any

    @property
    def begin(self):
        """Its first row."""
        return self.tile * TILE + self.group * ROWS

    def kept(self, i: int):
        """Its rows of an array that is kept."""
        return self.shared.kept[i].at[self.group]

    def scratch(self, i: int):
        """Its own scratch."""
        return self.shared.scratch[i].at[self.group]

    def keep(self):
        """Reads the rows that are kept."""
        arrived = self.shared.arrived.at[self.group]
        for i, x in enumerate(self.inputs.kept):
            part = _part(x, self.b, self.head, self.begin, ROWS)
            plgpu.copy_gmem_to_smem(part, self.kept(i), arrived)
        plgpu.barrier_wait(arrived)

    def fetch(self):
        """Fetches all steps."""

        def visit(_, step, partial):
            begin = step.begin()  # which is on its way while the stage isn't free
            plgpu.barrier_wait(step.free)
            for i, arrays in enumerate(self.inputs.fetched):
                ready = self.shared.ready[i].at[step.stage]
                for x, buffer in zip(arrays, self.shared.ring[i], strict=True):
                    part = _part(x, self.b, step.head, begin, self.steps.size)
                    plgpu.copy_gmem_to_smem(part, buffer.at[step.stage], ready)
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
        """Copies its rows of outputs, pairs of shared memory and the output, to where they go."""
        plgpu.commit_smem()
        for memory, output in staged:
            part = _part(output, self.b, self.head, self.begin, ROWS)
            plgpu.copy_smem_to_gmem(memory, part)
        plgpu.wait_smem_to_gmem(0)

    def _each(self, visit, carry):
        kept, fetched = (_heads(x) for x in (self.inputs.kept[0], self.inputs.fetched[0][0]))
        lists = max(1, fetched // kept)  # which are walked one after the other

        def of_list(i, carry):
            n = self.head * lists + i

            def of_step(carry, begin, partial):
                number, inner = carry
                stage = lax.rem(number, self.steps.stages)
                head = lax.div(n, max(1, kept // fetched))
                return number + 1, visit(inner, Step(self, n, head, begin, stage), partial)

            return self.walk.each(self.tables, (self.b, n, self.tile), of_step, carry)

        carry = jnp.int32(0), carry
        of_all = of_list(0, carry) if lists == 1 else lax.fori_loop(0, lists, of_list, carry)
        return of_all[1]


@dataclasses.dataclass(frozen=True)
class Step:
    """Columns that a warpgroup meets."""

    work: Work
    n: Any  # query head
    head: Any  # of what is fetched
    begin: Callable  # the first column
    stage: Any

    @property
    def free(self):
        """The barrier that says that the stage may be written."""
        return self.work.shared.free.at[self.stage]

    def ready(self, i: int):
        """What was fetched by the i-th barrier, when it is there."""
        plgpu.barrier_wait(self.work.shared.ready[i].at[self.stage])
        return [x.at[self.stage] for x in self.work.shared.ring[i]]


def _heads(x):
    return x.shape[2] if len(x.shape) == 4 else x.shape[1]


def _part(x, b, head, begin, size):
    """Rows of an array (B L heads F) or (B heads L)."""
    rows = pl.ds(begin, size)
    return x.at[b, rows, head] if len(x.shape) == 4 else x.at[b, head, rows]
