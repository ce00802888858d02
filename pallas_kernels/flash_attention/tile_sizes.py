"""How large tiles are: what the table of a device says, as far as its fast memory (VMEM) allows."""

import math
from typing import NamedTuple

import jax

from pallas_kernels import tables


class Sizes(NamedTuple):
    """Queries and keys of a tile, and the bytes of VMEM that a kernel may take."""

    block_q: int
    block_k: int
    vmem: int


_MIB = 2**20
_VMEM = {  # about three quarters of each one's
    "TPU v4": 12 * _MIB,
    "TPU v5 lite": 96 * _MIB,
    "TPU v5": 48 * _MIB,
    "TPU v6 lite": 96 * _MIB,
    "TPU7x": 48 * _MIB,
}
_UNKNOWN = Sizes(1024, 1024, 48 * _MIB)  # another device is taken for a TPU v5
LANES = 128  # sizes of tiles are multiples of it
_LEAST = 256  # smaller tiles cost more in steps than they spare


def choices(
    q: jax.Array, k: jax.Array, v: jax.Array, *, sheets: int = 0, kind: str | None = None
) -> list[Sizes]:
    """Sizes for queries (B T N H), keys and values, the largest first; each half the one before.

    Args:
      sheets: how many arrays with an entry for each score a kernel reads.
      kind: of the device, as jax names it; None is the one that is traced for.
    """
    sizes = _largest(q, k, v, tables.of(kind) if kind else tables.here())
    widths = [-(-x.shape[-1] // LANES) * LANES * x.dtype.itemsize for x in (q, k, v)]
    while vmem(sizes, widths, sheets) > sizes.vmem and min(sizes[:2]) > LANES:
        sizes = halved(sizes)
    found = []
    while not found or min(sizes[:2]) >= _LEAST:
        even = _even(q.shape[1], sizes.block_q), _even(k.shape[1], sizes.block_k)
        found.append(Sizes(*even, sizes.vmem))
        sizes = halved(sizes)
    return list(dict.fromkeys(found))


def _largest(q, k, v, table):
    """What the table says for these arrays, and the VMEM of its kind of device."""
    row = table.find(
        "dot_product_attention",
        dtype=q.dtype,
        head_dim=max(q.shape[-1], v.shape[-1]),
        length=math.sqrt(q.shape[1] * k.shape[1]),
        implementation="pallas",
    )
    if row is None or table.platform != "tpu":
        return _UNKNOWN
    return _UNKNOWN._replace(**row.tiles, vmem=_VMEM.get(table.kind, _UNKNOWN.vmem))


def _even(length, most):
    """A size near `most` that leaves little of the last tile over."""
    count = -(-length // most)
    return -(-length // (count * LANES)) * LANES


def halved(sizes: Sizes) -> Sizes:
    """Tiles of half the size."""
    return sizes._replace(block_q=sizes.block_q // 2, block_k=sizes.block_k // 2)


def vmem(sizes: Sizes, widths: list[int], sheets: int) -> int:
    """Bytes that the backward kernels, which take the most, need at most.

    widths are the bytes of a query, a key and a value. As compiled: three tiles of scores are held
    at once, each sheet and block twice (one is on its way), sums in float32.
    """
    q, k, v = widths
    score = 4 * sizes.block_q * sizes.block_k
    blocks = 2 * sizes.block_q * (q + v) + 8 * sizes.block_k * (k + v)
    return (3 + 3 * sheets) * score + blocks
