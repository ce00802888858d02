"""How a warpgroup of the kernels for Hopper walks over time.

A block of threads is one warpgroup, with some entries of the states of CHANNELS channels. Tokens
are fetched STEP at a time into a ring of stages in shared memory, and outputs leave from there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.selective_scan.mosaic_gpu.layout import CHANNELS, GROUP, STEP, Cut

STAGES = 3  # of what is fetched


class Block(NamedTuple):
    """A block of threads: where it is, and references by their names."""

    cut: Cut
    arrays: Any  # in global memory
    fetched: dict  # stages of inputs, in shared memory
    sent: dict  # two of each output
    scratch: dict
    ready: Any  # the barrier of each stage
    b: Any
    n: Any
    j: Any  # part of the channels
    p: Any  # part of the entries

    @property
    def rows(self):
        """Its channels."""
        return pl.ds(self.j * CHANNELS, CHANNELS)

    @property
    def columns(self):
        """Its entries."""
        return pl.ds(self.p * self.cut.E, self.cut.E)

    def matrix(self, array, *at) -> jax.Array:
        """Its part of an array (... H M)."""
        part = array.at[*at, self.rows, self.columns]
        x = plgpu.load(part, layout=plgpu.Layout.WGMMA, optimized=False)
        # what is loaded from here has the axes of a mesh that it varies over; what is made of it,
        # and a loop carries on, has none
        return x + jnp.zeros(x.shape, x.dtype)

    def walk(self, visit: Callable, carry, *, reverse=False, every: int = 1):
        """`carry = visit(step, inputs, outputs, carry)` for all steps of time.

        inputs and outputs are in shared memory. States are sent `every` so many steps.
        """
        steps = self.cut.T // STEP
        number = lambda i: steps - 1 - i if reverse else i
        for i in range(min(STAGES, steps)):
            self._fetch(number(i), i)

        def step(i, carry):
            stage, slot, at = lax.rem(i, STAGES), lax.rem(i, 2), number(i)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # all but the last are on their way
            plgpu.barrier_wait(self.ready.at[stage])
            inputs = {name: x.at[stage] for name, x in self.fetched.items()}
            outputs = {name: x.at[slot] for name, x in self.sent.items()}
            carry = visit(at, inputs, outputs, carry)
            plgpu.commit_smem()  # and no thread reads the stage any more
            for name, x in outputs.items():
                due = lax.rem(at, every) == 0 if name == "states" else True
                pl.when(due)(lambda name=name, x=x: self._send(name, x, at, every))
            plgpu.commit_smem_to_gmem_group()
            pl.when(i + STAGES < steps)(lambda: self._fetch(number(i + STAGES), stage))
            return carry

        carry = lax.fori_loop(0, steps, step, carry)
        plgpu.wait_smem_to_gmem(0)
        return carry

    def put(self, name: str, x, *at):
        """Copies what all of time gives to where it goes, by way of scratch."""
        memory = self.scratch["matrix" if len(x.shape) == 2 else "row"]
        memory[...] = x
        plgpu.commit_smem()
        columns = [self.columns] if len(x.shape) == 2 else []
        output = getattr(self.arrays, name).at[*at, self.rows, *columns]
        plgpu.copy_smem_to_gmem(memory, output)
        plgpu.wait_smem_to_gmem(0)

    def _fetch(self, step, stage):
        for name, memory in self.fetched.items():
            part = self._part(name, step, 1)
            plgpu.copy_gmem_to_smem(part, memory.at[stage], self.ready.at[stage])

    def _send(self, name, memory, step, every):
        plgpu.copy_smem_to_gmem(memory, self._part(name, step, every), commit_group=False)

    def _part(self, name, step, every):
        """What a step has of an array."""
        array, tokens = getattr(self.arrays, name), pl.ds(step * STEP, STEP)
        match name:
            case "x" | "delta" | "dy":
                return array.at[self.b, tokens, self.n, self.rows]
            case "b" | "c":
                return array.at[self.b, tokens, self.n, self.columns]
            case "y" | "dx" | "ddelta":
                return array.at[self.p, self.b, tokens, self.n, self.rows]
            case "db" | "dc":  # (B blocks groups GROUP*E)
                groups = STEP // GROUP
                block = self.n * (self.cut.H // CHANNELS) + self.j
                block = block * self.cut.parts + self.p
                return array.at[self.b, block, pl.ds(step * groups, groups)]
            case "states":  # (B*pieces N each H M), of pieces of time
                each, pieces = array.shape[2] * every, array.shape[0] // self.arrays.x.shape[0]
                b = self.b * pieces + lax.div(step, each)
                at = lax.div(lax.rem(step, each), every)
                return array.at[b, self.n, at, self.rows, self.columns]
