"""Which blocks of all keys the queries of a device choose: what `block_ring` computes.

What a query looks for and what stands for a block are a function's gates (`gate_q`, `gate_k`), or
else the queries and the means of the keys. What stands for a block is known to every device.

Letters: L blocks, C keys of a block, A blocks of a query, E numbers that are compared.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from attnjax.core import masks
from attnjax.ops import best_blocks, block_selection
from attnjax.parallel import layout, split

_GATES = {"gate_q", "gate_k"}


def is_of(fn: Callable) -> bool:
    """Whether a function chooses so."""
    parameters = set(inspect.signature(fn).parameters)
    return {"block", "topk"} <= parameters and ("means" in parameters or parameters >= _GATES)


class Choice(NamedTuple):
    """What a device knows of the keys of all, and what its queries chose."""

    seen: Bool[Array, "B L C"]  # which keys there are and the mask leaves to any query
    t: Int[Array, "T"]  # positions of the queries
    selected: Int[Array, "B T N A"]  # L in the place of a block that a query can't see

    @classmethod
    def of(cls, call: split.Call, places: layout.Places, block: int) -> "Choice":
        """The choice of the queries that are here."""
        q = call.arrays["q"]
        seen = block_selection.by_block(_seen(call.mask, len(q), places), block)
        t = places.first("T") + jnp.arange(q.shape[1])
        filled, own = seen.any(2), t // block
        wants, stands = _compared(call, places, seen, block)
        count = dict(count=call.options["topk"], own=True)
        selected = best_blocks.best_blocks(wants, stands, filled, own, **count)
        return cls(seen, t, _usable(selected, filled, own))


def _seen(mask, B, places):
    """Which keys of all there are and the mask leaves to any query: (B S)."""
    _, valid = masks.select(mask, masks.Causal, masks.Valid, by="block_ring")
    S, length = places.sizes["S"], places.length("S")
    seen = functools.reduce(jnp.logical_and, (x.keys for x in valid), jnp.ones((B, S), bool))
    return jnp.pad(seen, ((0, 0), (0, length - S)))


def _compared(call, places, seen, block):
    """What the queries here look for (B T N E), and what stands for each block (B L K E)."""
    if "gate_k" in call.arrays:
        gate_k, count = call.arrays["gate_k"], -(-places.sizes["S"] // block)
        if gate_k.shape[1] != count:
            raise ValueError(f"gate_k {gate_k.shape} must be of {count} blocks")
        more = seen.shape[1] - count  # blocks that only fill up
        return call.arrays["gate_q"], jnp.pad(gate_k, ((0, 0), (0, more), (0, 0), (0, 0)))
    k = call.arrays["k"]
    first = places.first("S") // block
    here = lax.dynamic_slice_in_dim(seen, first, k.shape[1] // block, 1)
    means = block_selection.means(k, block, here.reshape(*k.shape[:2]))
    return call.arrays["q"], lax.all_gather(means, places.axis, axis=1, tiled=True)


def _usable(selected, filled, own):
    """Blocks (B T N A), and L in the place of one that its query can't see."""
    b, own = jnp.arange(len(selected))[:, None, None, None], own[None, :, None, None]
    usable = (selected == own) | ((selected < own) & filled[b, selected])
    return jnp.where(usable, selected, filled.shape[1])
