"""What a warpgroup of the kernels for Hopper does with each token.

States are matrices (channels, entries) in registers: x and delta are columns beside them, b and c
rows.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.selective_scan.mosaic_gpu.layout import CHANNELS, GROUP, STEP

LOG2E = math.log2(math.e)
_LAYOUT = plgpu.Layout.WGMMA
_GROUPS = STEP // GROUP


def forward(every: int | None, block):
    """y, and states before each `every` steps, of what `block` has."""
    rate, skip = _weights(block)

    def visit(step, inputs, outputs, h):
        if every:

            @pl.when(lax.rem(step, every) == 0)
            def _():
                outputs["states"][...] = h

        def group(g, h):
            for token in _tokens(block, inputs, step, g):
                h = token.decay(rate) * h + token.added
                if "y" in outputs:
                    y = (h * token.c).sum(1) + skip * token.x
                    _store(outputs["y"], token.row, y)
            return h

        return lax.fori_loop(0, _GROUPS, group, h)

    state = block.matrix(block.arrays.before, block.b, block.n)
    block.put("after", block.walk(visit, state, every=every or 1), block.b, block.n)


def backward(block):
    """Gradients, from the last step to the first."""
    rate, skip = _weights(block)
    before = block.scratch["before"]  # states before each group

    def visit(step, inputs, outputs, carry):
        before.at[0][...] = h = _load(inputs["states"])

        def remember(g, h):
            for token in _tokens(block, inputs, step, g):
                h = token.decay(rate) * h + token.added
            before.at[g + 1][...] = h
            return h

        lax.fori_loop(0, _GROUPS - 1, remember, h)
        plgpu.commit_smem()  # all threads have written

        def back(i, carry):
            g = _GROUPS - 1 - i
            tokens, h = _tokens(block, inputs, step, g), _load(before.at[g])
            return _back(tokens, h, rate, skip, inputs["dy"], outputs, g, carry)

        return lax.fori_loop(0, _GROUPS, back, carry)

    dh = block.matrix(block.arrays.dafter, block.b, block.n)
    carry = dh, jnp.zeros(rate.shape, jnp.float32), jnp.zeros(rate.shape[:1], jnp.float32)
    dh, drate, dskip = block.walk(visit, carry, reverse=True)
    block.put("dbefore", dh, block.b, block.n)
    block.put("drate", drate, block.b, block.n)
    once = block.p == 0  # every part has it
    pl.when(once)(lambda: block.put("dskip", dskip, block.b, block.n))


def _back(tokens, h, rate, skip, dys, outputs, g, carry):
    """The carry before a group of tokens, of which h is the state before; stores gradients."""
    dh, drate, dskip = carry
    states = [h]
    for token in tokens:
        states.append(token.decay(rate) * states[-1] + token.added)
    columns = []
    for token, before, after in reversed(list(zip(tokens, states[:-1], states[1:], strict=True))):
        dy, delta = _column(dys, token.row), token.delta
        dh = dh + token.c * _beside(dy, rate)
        columns.append((dh * _beside(delta * token.x, rate), after * _beside(dy, rate)))
        dadded = (dh * token.b).sum(1)
        dh = token.decay(rate) * dh
        dexponent = dh * before
        drate = drate + dexponent * _beside(delta, rate)
        ddelta = (dexponent * rate).sum(1) * (1 / LOG2E) + dadded * token.x
        dskip = dskip + dy * token.x
        _store(outputs["dx"], token.row, dadded * delta + skip * dy)
        _store(outputs["ddelta"], token.row, ddelta)
    for name, parts in zip(("db", "dc"), zip(*columns[::-1], strict=True), strict=True):
        _store(outputs[name], g, jnp.concatenate(parts, 1).sum(0))
    return dh, drate, dskip


class _Token(NamedTuple):
    """A token's columns and rows, in float32."""

    row: jax.Array  # of the step
    x: jax.Array  # (channels)
    delta: jax.Array
    b: jax.Array  # (channels entries)
    c: jax.Array
    keep: jax.Array | None  # 0 where it begins a segment, else 1; None where none does

    def decay(self, rate):
        """Of states, by the rate for exponents of base 2."""
        decay = jnp.exp2(_beside(self.delta, rate) * rate)
        return decay if self.keep is None else decay * self.keep

    @property
    def added(self):
        return _beside(self.delta * self.x, self.b) * self.b


def _tokens(block, inputs, step, g):
    """The tokens of a step's group g."""
    keeps, E = getattr(block.arrays, "keeps", None), block.cut.E
    shape = CHANNELS, E

    def along(name, row):
        x = plgpu.load(inputs[name].at[row], layout=_LAYOUT.reduce(0), optimized=False)
        return lax.broadcast_in_dim(x, shape, (1,))

    def token(row):
        x, delta = (_column(inputs[name], row) for name in ("x", "delta"))
        keep = None if keeps is None else keeps[block.b, step * STEP + row]
        return _Token(row, x, delta, along("b", row), along("c", row), keep)

    return [token(g * GROUP + t) for t in range(GROUP)]


def _weights(block):
    rate = block.matrix(block.arrays.rate, block.n)
    skip = block.arrays.skip.at[block.p, block.n, block.rows]
    return rate, plgpu.load(skip, layout=_LAYOUT.reduce(1), optimized=False)


def _column(reference, row):
    """One number for each channel."""
    x = plgpu.load(reference.at[row], layout=_LAYOUT.reduce(1), optimized=False)
    return x.astype(jnp.float32)


def _beside(x, matrix):
    return lax.broadcast_in_dim(x, matrix.shape, (0,))


def _load(reference):
    return plgpu.load(reference, layout=_LAYOUT, optimized=False)


def _store(reference, row, x):
    reference.at[row][...] = x.astype(reference.dtype)
