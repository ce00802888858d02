"""What a step of the kernel for Hopper takes, and which steps each part of a sequence has."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention import part as maths

ROWS = 64  # of a product
_KEYS = 64, 32, 16  # of a step
_MOST_KEYS = 64
_MOST_STAGES = 4
_WIDEST = 256  # values of which a warpgroup's registers hold sums
_SHARED = 227 * 1024 - 2 * 1024  # bytes, but for barriers and alignment


class Sizes(NamedTuple):
    """Of a block of threads."""

    keys: int  # of a step
    unit: int  # keys that are copied at once: as many as divide a page
    of_page: int  # units
    stages: int  # steps that there is room for
    features: int  # that matrices are laid out by
    rows: int  # of the queries that exist, of each ROWS
    by_rows: bool  # whether warpgroups have rows of their own, or else columns of the values
    groups: int  # warpgroups that compute
    columns: int  # of the values, of a warpgroup
    width: int  # of them, of a product

    @classmethod
    def of(cls, q, k, v, V: int, most_keys: int | None = None) -> "Sizes":
        """For q (B K R H); raises NotImplementedError for what the kernel can't take.

        Raises ValueError for most_keys, of a step, that a step can't have.
        """
        if most_keys not in (None, *_KEYS):
            raise ValueError(f"keys={most_keys} of a step on Hopper must be one of {_KEYS}")
        (_, _, R, H), C = q.shape, k.shape[2]
        _check(q, k, v, C, H, V)
        by_rows, groups = V <= _WIDEST, 2 if R > ROWS or V > _WIDEST else 1
        columns = V if by_rows else V // 2
        most = 128 if columns <= 128 else 64
        for keys in _KEYS:
            if keys > (most_keys or _MOST_KEYS):
                continue
            features = math.gcd(keys, H, columns)
            width = max(x for x in range(features, most + 1, features) if columns % x == 0)
            rows = groups if by_rows else 1
            kept = rows * ROWS * 2 * H + groups * ROWS * (2 * keys + 4 * width + 4)
            fetched = 2 * keys * (H + (0 if v is None else V))
            stages = min(_MOST_STAGES, (_SHARED - kept) // fetched)
            if stages >= 2:
                unit, exist = math.gcd(C, keys), ROWS if R > ROWS else -(-R // 8) * 8
                sizes = keys, unit, C // unit, stages, features, exist
                return cls(*sizes, by_rows, groups, columns, width)
        raise NotImplementedError(
            f"keys of {H} and values of {V} features don't fit the shared memory of Hopper"
        )

    @property
    def V(self):
        return self.columns if self.by_rows else self.groups * self.columns

    @property
    def units(self):
        """Of a step."""
        return self.keys // self.unit

    @property
    def row_tiles(self):
        """ROWS rows each, of a block."""
        return self.groups if self.by_rows else 1

    def tiles(self, R: int) -> int:
        """How many blocks R rows take."""
        return -(-R // (self.row_tiles * ROWS))

    def padded(self, R: int) -> int:
        """How many rows they are filled up to."""
        return self.rows if R <= ROWS else self.tiles(R) * self.row_tiles * ROWS


def _check(q, k, v, C, H, V):
    dtypes = {str(x.dtype) for x in (q, k, v) if x is not None}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        raise NotImplementedError(
            f"the kernel for Hopper multiplies bfloat16 or float16, not {sorted(dtypes)}"
        )
    if C % 8:
        raise NotImplementedError(f"the kernel for Hopper has pages of 8, 16, 24..., not {C} keys")
    if H % 16 or V % 16:
        raise NotImplementedError(
            f"the kernel for Hopper has 16, 32, 48... features, not {H} of keys and {V} of values"
        )
    if V > 2 * _WIDEST or (V > _WIDEST and V % 128):
        raise NotImplementedError(
            f"the kernel for Hopper has values of {_WIDEST} features, 384 or 512, not {V}"
        )


class Ends(NamedTuple):
    """Where sequences end and begin; arrays (B)."""

    lengths: jax.Array
    starts: jax.Array  # positions of the first queries
    last: jax.Array  # the last unit that holds a token


def tails(sizes: Sizes, pool, table, ends: Ends):
    """The last unit of each sequence, zero where there is no token, and an empty one behind them.

    They are (B + 1 K unit F), of a pool (P K C F).
    """
    P, K, C, F = pool.shape
    page = jnp.take_along_axis(table, (ends.last // sizes.of_page)[:, None], 1)[:, 0]
    begin = ends.last % sizes.of_page * sizes.unit
    own = jax.vmap(
        lambda page, begin: jax.lax.dynamic_slice(pool, (page, 0, begin, 0), (1, K, sizes.unit, F))[
            0
        ]
    )(jnp.clip(page, 0, P - 1), begin)
    token = (ends.last * sizes.unit)[:, None] + np.arange(sizes.unit)[None] < ends.lengths[:, None]
    own = jnp.where(token[:, None, :, None], own, jnp.zeros_like(own))
    return jnp.pad(own, ((0, 1), (0, 0), (0, 0), (0, 0)))


def bounds(options: maths.Options, lengths, starts, *, size: int, splits: int):
    """Steps of `size` keys that each part of a sequence has: (B X 4), i to j to k to l.

    Of i to j and k to l some queries don't see some keys; of j to k all see all.
    """
    low, each = maths.shares(options, lengths, starts, size=size, splits=splits)
    stop = jnp.minimum(lengths, jnp.maximum(starts + options.T, 0))
    begin = low[:, None] + np.arange(splits)[None] * each[:, None]
    end = -(-stop // size)[:, None]
    begin = jnp.minimum(begin, end)
    end = jnp.minimum(begin + each[:, None], end)
    full = jnp.clip((jnp.minimum(lengths, starts + 1) // size)[:, None], begin, end)
    first = jnp.zeros_like(starts)
    if options.window is not None:
        first = -(-jnp.maximum(starts + options.T - 1 - options.window, 0) // size)
    first = jnp.clip(first[:, None], begin, full)
    return jnp.stack([begin, first, full, end], -1).astype(jnp.int32)
