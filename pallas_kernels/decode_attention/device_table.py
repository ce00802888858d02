"""What the table of the device says of a call, by the room that a sequence has in its pages."""

import jax

from pallas_kernels import tables

_NAME = "decode_attention"


def find(k: jax.Array, table: jax.Array, V: int) -> tables.Row | None:
    """The row for pages k (P K C H), which the table (B L) names, and values of V features."""
    return tables.here().find(_NAME, **_case(k, table, V))


def tiles(k: jax.Array, table: jax.Array, V: int, rules: dict, *, kernel_for: str | None) -> dict:
    """`Table.tiles` likewise."""
    return tables.here().tiles(_NAME, rules, kernel_for=kernel_for, **_case(k, table, V))


def _case(k, table, V):
    *_, C, H = k.shape
    return dict(dtype=k.dtype, head_dim=max(H, V), length=table.shape[1] * C)
