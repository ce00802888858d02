"""How large tiles are, by the kind of device: as large as its fast memory (VMEM) allows."""

from typing import NamedTuple

import jax


class Sizes(NamedTuple):
    """Queries and keys of a tile, and the bytes of VMEM that a kernel may take."""

    block_q: int
    block_k: int
    vmem: int


_MIB = 2**20
_KINDS = {  # about three quarters of each one's VMEM
    "TPU v4": Sizes(512, 512, 12 * _MIB),
    "TPU v5 lite": Sizes(1024, 1024, 96 * _MIB),
    "TPU v5": Sizes(1024, 1024, 48 * _MIB),
    "TPU v6 lite": Sizes(2048, 2048, 96 * _MIB),
    "TPU7x": Sizes(1024, 1024, 48 * _MIB),
}
_DEFAULT = _KINDS["TPU v5"]
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
    sizes = _KINDS.get(kind or _kind(), _DEFAULT)
    widths = [-(-x.shape[-1] // LANES) * LANES * x.dtype.itemsize for x in (q, k, v)]
    while vmem(sizes, widths, sheets) > sizes.vmem and min(sizes[:2]) > LANES:
        sizes = halved(sizes)
    found = []
    while not found or min(sizes[:2]) >= _LEAST:
        even = _even(q.shape[1], sizes.block_q), _even(k.shape[1], sizes.block_k)
        found.append(Sizes(*even, sizes.vmem))
        sizes = halved(sizes)
    return list(dict.fromkeys(found))


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


def _kind():
    """The device of the mesh that is traced for, or the first of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device or jax.devices()[0]).device_kind
