"""How a warpgroup walks over the chunks of a head, with the state in its registers.

While it computes with the matrices of a chunk, those of the next are on their way. Unlike for
softmax no other warpgroup fetches them: the one that computes is the first to know that a stage is
free, and nothing else would come sooner.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_recurrence.mosaic_gpu.pieces import Pieces

STAGES = 2  # chunks in shared memory at once


class Shared(NamedTuple):
    """Shared memory, and the barriers that say when it may be read."""

    ring: Pieces  # of stages
    state: Any  # in float32: as it comes, is kept and goes
    now: Any  # the state, as products take it
    u: Any
    o: Any
    ready: Any  # a stage
    arrived: Any  # the first state


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A chunk, as a warpgroup meets it."""

    pieces: Pieces  # references to shared memory
    shared: Shared
    number: Any  # among the chunks of all heads
    rows: Any
    copies: int  # that each chunk sends out

    def put_out(self, x, memory, output):
        """Begins to copy x, by way of shared memory, to this chunk's part of an output.

        A chunk puts out each of its outputs once, always in the same order.
        """
        # what was put out of this memory is older than all but so many copies
        plgpu.wait_smem_to_gmem(self.copies - 1, wait_read_only=True)
        memory[...] = x.astype(memory.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory, output.at[self.number, self.rows])


@dataclasses.dataclass(frozen=True)
class Walk:
    """A warpgroup's way over the chunks of a head."""

    inputs: Pieces  # references to global memory
    shared: Shared
    number: Callable  # of the i-th chunk, among those of all heads
    rows: Any
    length: int

    def run(self, step: Callable, first, last, *, copies: int):
        """`state = step(chunk, state)`; first and last are references to those states."""
        shared = self.shared
        plgpu.copy_gmem_to_smem(first, shared.state, shared.arrived)
        for i in range(min(STAGES, self.length)):
            self.fetch(i, i)
        plgpu.barrier_wait(shared.arrived)

        def visit(i, state):
            stage = lax.rem(i, STAGES)
            plgpu.barrier_wait(shared.ready.at[stage])
            there = jax.tree.map(lambda x: x.at[stage], shared.ring)
            state = step(Chunk(there, shared, self.number(i), self.rows, copies), state)
            plgpu.commit_smem()  # every warp has read what is overwritten now
            pl.when(i + STAGES < self.length)(lambda: self.fetch(i + STAGES, stage))
            return state

        state = plgpu.load(shared.state, layout=plgpu.Layout.WGMMA)
        state = lax.fori_loop(0, self.length, visit, state)
        plgpu.wait_smem_to_gmem(0)
        shared.state[...] = state
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared.state, last)
        plgpu.wait_smem_to_gmem(0)

    def fetch(self, i, stage):
        """Begins to copy the i-th chunk's matrices, of v the warpgroup's rows alone, to a stage."""
        number, ring, ready = self.number(i), self.shared.ring, self.shared.ready.at[stage]
        parts = jax.tree.map(lambda x: x.at[number], self.inputs)
        parts = parts._replace(v=self.inputs.v.at[number, self.rows])
        for part, buffer in zip(jax.tree.leaves(parts), jax.tree.leaves(ring), strict=True):
            plgpu.copy_gmem_to_smem(part, buffer.at[stage], ready)
