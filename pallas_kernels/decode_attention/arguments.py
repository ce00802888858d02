"""Which arguments fit together."""

import jax.numpy as jnp
import numpy as np


def check(q, k, v, table, lengths, q_offset, sinks):
    """Raises ValueError for shapes and dtypes that don't fit."""
    (B, T, N, H), (P, K, C, _) = q.shape, k.shape
    if k.shape[3] != H or (v is not None and v.shape[:3] != k.shape[:3]):
        of_v = "none" if v is None else v.shape
        raise ValueError(f"shapes don't fit: q {q.shape}, pages of k {k.shape}, of v {of_v}")
    if N % K:
        raise ValueError(f"{N} query heads must be a multiple of {K} key heads")
    if q.dtype != k.dtype:
        raise ValueError(f"queries of {q.dtype} must have the dtype of the keys, {k.dtype}")
    if T == 0 or P == 0 or C == 0 or table.ndim != 2 or table.size == 0:
        raise ValueError(f"nothing may be empty: q {q.shape}, k {k.shape}, table {table.shape}")
    for name, x, shape in (
        ("table", table, (B, table.shape[1])),
        ("lengths", lengths, (B,)),
        ("q_offset", q_offset, (B,)),
        ("sinks", sinks, (N,)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} of shape {x.shape} must have shape {shape}")
    for name, x in (("table", table), ("lengths", lengths), ("q_offset", q_offset)):
        if x is not None and not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} of {x.dtype} must be integers")
    room = table.shape[1] * C
    if isinstance(lengths, np.ndarray) and not (0 <= lengths.min() <= lengths.max() <= room):
        raise ValueError(f"{lengths=} must be from 0 to {room}, which the table has room for")


def check_options(k, v, value_dim, window, splits):
    """Raises ValueError for options out of range."""
    if (v is None) != (value_dim is not None):
        raise ValueError(f"{value_dim=} must be given without v, and only then")
    if value_dim is not None and not 0 < value_dim <= k.shape[3]:
        raise ValueError(f"{value_dim=} must be from 1 to the {k.shape[3]} features of a key")
    if window is not None and window < 0:
        raise ValueError(f"{window=} must not be negative")
    if splits is not None and splits < 1:
        raise ValueError(f"{splits=} must be at least 1")
