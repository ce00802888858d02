"""A cache of keys and values in pages, which sequences of any lengths share.

    cache = PagedCache.empty(batch, length, K, H, V, dtype, page_size=128, pages=1000)
    cache = cache.reserve(tokens)              gives each sequence pages for so many tokens in all
    cache = cache.append(k, v, counts)         writes new tokens behind those of each sequence
    cache = cache.release(finished)            gives the pages of some sequences back

A table says which page holds which tokens of a sequence. A page that it names nowhere is free:
there is no other list, so none can disagree with it. All are pure functions of arrays, to be
compiled with what uses them. Source: Kwon et al., "Efficient Memory Management for Large Language
Model Serving with PagedAttention", arXiv:2309.06180, section 4.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

_NONE = -1  # in a table: no page


class PagedCache(NamedTuple):
    """P pages of C tokens, of which each of B sequences has at most L.

    Within a page the tokens of a head lie together, as they are multiplied. Without v the front of
    a key is its value (`ops.decode_attention`).
    """

    k: Float[Array, "P K C H"]
    v: Float[Array, "P K C V"] | None
    table: Int[Array, "B L"]
    lengths: Int[Array, "B"]

    @classmethod
    def empty(
        cls,
        batch: int,
        length: int,
        num_kv_heads: int,
        H: int,
        V: int | None,
        dtype: DTypeLike,
        *,
        page_size: int,
        pages: int | None = None,
    ) -> "PagedCache":
        """A cache for at most `length` tokens of each sequence; V None is a cache without v.

        pages is the size of the pool, of which `reserve` gives. None is as many as there can be,
        given already. Raises ValueError for sizes below 1.
        """
        if min(page_size, length, 1 if pages is None else pages) < 1:
            raise ValueError(f"{page_size=}, {length=} and {pages=} must be at least 1")
        L = -(-length // page_size)
        table = jnp.arange(batch * L, dtype=jnp.int32).reshape(batch, L)
        P = batch * L if pages is None else pages
        pool = lambda size: jnp.zeros((P, num_kv_heads, page_size, size), dtype)
        v = None if V is None else pool(V)
        table = table if pages is None else jnp.full_like(table, _NONE)
        return cls(pool(H), v, table, jnp.zeros(batch, jnp.int32))

    @property
    def room(self) -> Int[Array, "B"]:
        """How many tokens each sequence has pages for."""
        return (self.table != _NONE).sum(1, dtype=jnp.int32) * self.k.shape[2]

    def reserve(self, tokens: Int[Array, "B"]) -> "PagedCache":
        """The cache with free pages given to sequences that have less room than `tokens`.

        Where free pages run out, or a sequence would have more than L, `room` stays smaller.
        """
        wanted = jnp.arange(self.table.shape[1])[None] < -(-tokens // self.k.shape[2])[:, None]
        wanted &= self.table == _NONE
        taken = self._taken()
        free = jnp.argsort(taken, stable=True).astype(self.table.dtype)  # those that are come first
        number = jnp.cumsum(wanted.reshape(-1)).reshape(wanted.shape) - 1
        given = wanted & (number < (~taken).sum())
        return self._replace(table=jnp.where(given, free[jnp.where(given, number, 0)], self.table))

    def append(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K V"] | None,
        counts: Int[Array, "B"] | None = None,
    ) -> "PagedCache":
        """The cache with T more tokens of each sequence, or its first `counts` of them.

        A token for which there is no room isn't kept, which `lengths` tells. Raises ValueError
        for v where the cache has none, and the other way round.
        """
        if (v is None) != (self.v is None):
            raise ValueError("v must be given where the cache has values, and only there")
        (B, T), (P, _, C, _) = k.shape[:2], self.k.shape
        counts = jnp.full(B, T) if counts is None else counts
        lengths = jnp.minimum(self.lengths + jnp.minimum(counts, T), self.room)
        at = self.lengths[:, None] + jnp.arange(T)[None]
        last = self.table.shape[1] - 1
        page = jnp.take_along_axis(self.table, jnp.minimum(at // C, last), 1)
        page = jnp.where(at < lengths[:, None], page, P)  # there is none: nothing is written
        write = lambda pool, new: pool.at[page, :, at % C].set(new.astype(pool.dtype), mode="drop")
        v = None if self.v is None else write(self.v, v)
        return PagedCache(write(self.k, k), v, self.table, lengths.astype(self.lengths.dtype))

    def release(self, finished: Bool[Array, "B"]) -> "PagedCache":
        """The cache in which those sequences are empty and have no pages."""
        table = jnp.where(finished[:, None], _NONE, self.table)
        return self._replace(table=table, lengths=jnp.where(finished, 0, self.lengths))

    def _taken(self):
        """Which pages the table names (P)."""
        P = len(self.k)
        named = jnp.where(self.table == _NONE, P, self.table)
        return jnp.zeros(P, bool).at[named].set(True, mode="drop")


def projected(project: Callable, x: Float[Array, "B T D"], lengths: Int[Array, "B"]) -> Any:
    """The arrays (B T ...) of project(x, positions), by tokens behind `lengths` of each sequence.

    `project` knows one row of positions for all sequences: so all tokens are one sequence to it.
    """
    B, T, D = x.shape
    at = lengths[:, None] + jnp.arange(T)[None]
    arrays = project(x.reshape(1, B * T, D), at.reshape(-1))
    return jax.tree.map(lambda y: y.reshape(B, T, *y.shape[2:]), arrays)


def rewind(state: Any, lengths: Int[Array, "B"]) -> Any:
    """A tree of paged caches in which each sequence keeps `lengths` tokens at most.

    So prompts of different lengths are taken at once, filled up behind: what a later token
    overwrites was seen by none that counts. Raises ValueError for anything else in the tree.
    """

    def cut(cache):
        if not isinstance(cache, PagedCache):
            kind = type(cache).__name__
            raise ValueError(f"only paged caches can be rewound, and the state has {kind}")
        # lengths of each layer, where layers are a scan
        kept = jnp.broadcast_to(lengths, cache.lengths.shape)
        return cache._replace(lengths=jnp.minimum(cache.lengths, kept))

    return jax.tree.map(cut, state, is_leaf=lambda x: isinstance(x, PagedCache))
