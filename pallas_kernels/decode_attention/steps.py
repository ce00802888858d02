"""Which pages the kernel takes in each step: those of one sequence after the other."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention import part as maths


class Steps(NamedTuple):
    """What the kernel has in scalar memory before its blocks are fetched."""

    owner: jax.Array  # (steps), the sequence of each
    begin: jax.Array  # (B + 1), the first step of each sequence
    low: jax.Array  # (B), the first group of keys of each sequence
    lengths: jax.Array  # (B)
    starts: jax.Array  # (B), positions of the first queries
    table: jax.Array  # (B L), flat

    def place(self, x, step, pages: int):
        """(sequence, its first page here) of a step in part x."""
        b = self.owner[step]
        each = self.begin[b + 1] - self.begin[b]
        return b, (self.low[b] + x * each + step - self.begin[b]) * pages

    def page(self, x, step, pages: int, i: int, C: int):
        """The number in the pool of the step's i-th page, of C tokens.

        For one that doesn't exist, that of the step before: it is there already.
        """
        b, at = self.place(x, step, pages)
        at = at + i
        last = jnp.maximum(lax.div(self.lengths[b] + (C - 1), C) - 1, 0)
        over = jnp.maximum(at - last, 0)
        at = jnp.maximum(at - pages * lax.div(over + (pages - 1), pages), 0)
        L = self.table.shape[0] // self.lengths.shape[0]
        return self.table[b * L + at]


def make(options: maths.Options, table, lengths, starts, *, C: int, splits: int, pages: int):
    """(steps of `pages` pages of C tokens, how many of them there are)."""
    B, L = table.shape
    low, each = maths.shares(options, lengths, starts, size=pages * C, splits=splits)
    begin = jnp.pad(jnp.cumsum(each), (1, 0))
    most = B * -(-L // (pages * splits))
    owner = jnp.repeat(jnp.arange(B), each, total_repeat_length=most)
    steps = Steps(owner, begin, low, lengths, starts, table.reshape(-1))
    return Steps(*(x.astype(jnp.int32) for x in steps)), begin[-1]


def words(B: int, L: int, pages: int) -> int:
    """How many numbers the steps are, at most."""
    return B * L + B * -(-L // pages) + 4 * B + 1
