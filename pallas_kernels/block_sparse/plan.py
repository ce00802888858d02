"""Which sizes the tiles of queries and keys have that the kernels for TPU take."""

from typing import NamedTuple

from pallas_kernels import tables
from pallas_kernels.block_sparse import rows, walk

NAME = "block_sparse_attention"  # in tables of devices
_MOST = 512  # queries and keys of a tile
_LEAST = 64  # queries of a run that is worth a tile of its own
_VMEM = 14 * 2**20  # bytes, of the 16 MiB that a kernel has unless it asks for more
_LANES, _EVEN = 128, 16


class Plan(NamedTuple):
    """How queries and blocks are cut."""

    query_block: int  # 1 where queries are lined up by block
    size: int  # X, queries of a tile
    parts: int  # tiles of keys that a block is cut into
    pairs: int  # of a tile and a block, for each example and key head, at most
    keys: int  # that tell all choices of all blocks apart, by which they are sorted

    @property
    def fits(self) -> bool:
        """Whether scalar memory has room for the pairs, and integers for the keys."""
        return self.pairs <= walk.MOST_PAIRS and self.keys <= rows.MOST_KEYS


def plan_of(q, k, v, selected, *, block: int, query_block: int = 1) -> Plan:
    """The tiles to take: of `block_q` queries and `block_k` keys at most.

    Both are what the table of the device says (`pallas_kernels.tables`), halved until fast memory
    has room, or 512 likewise; that too where tiles as the table has them would be too many. Raises
    ValueError for a row whose tiles aren't these, in multiples of 16.

    Lined up, a block has tiles of half the queries that select it on average: fewer would be more
    steps, and more would leave more of the last tile empty. A run is in tiles of 64 queries or
    more, or else lined up.
    """
    most = _most(q, v)
    rules, case = dict(block_q=most, block_k=most), tables.case_between(q, k, v)
    asked = tables.here().tiles(NAME, rules, kernel_for="tpu", multiple_of=_EVEN, **case)
    options = dict(block=block, query_block=query_block)
    if asked != rules:
        plan = _planned(q, k, selected, *_halved(q, v, *asked.values()), **options)
        if plan.fits:
            return plan
    return _planned(q, k, selected, most, most, **options)


def _planned(q, k, selected, block_q, block_k, *, block, query_block):
    (T, N), (S, K), A = q.shape[1:3], k.shape[1:3], selected.shape[-1]
    parts, L, R = -(-block // block_k), -(-S // block), T * N // K
    run = max(size for size in range(1, block_q + 1) if query_block % size == 0)
    if run >= _LEAST:
        pairs = N // K * -(-T // run) * A
        return Plan(query_block, run, parts, pairs, pairs * L)
    size = R * A // (2 * L)
    size = min(block_q, max(8, size - size % (_LANES if size > _LANES else 8)))
    return Plan(1, size, parts, rows.most_tiles(R * A, L, size), R * A * L)


def _most(q, v):
    """Queries and keys of a tile at most: as many as fast memory has room for."""
    sizes = _MOST, 256, 128, 64, 32, 16, 8
    return next(size for size in sizes if _need(q, v, size, size) <= _VMEM)


def _halved(q, v, block_q, block_k):
    """Sizes that fast memory has room for, of which the larger was halved until it had."""
    while _need(q, v, block_q, block_k) > _VMEM:
        if block_q > block_k:
            block_q //= 2
        else:
            block_k //= 2
    return block_q, block_k


def _need(q, v, block_q, block_k):
    """Bytes that a kernel takes at most.

    Four tiles of scores are held at once, each block of queries and of keys twice (one is on its
    way), and for either the gradient: twice, and its sum in float32.
    """
    width = sum(-(-x.shape[-1] // _LANES) * _LANES for x in (q, v))
    blocks = 2 * (block_q + block_k) + 3 * max(block_q, block_k)
    return 4 * 4 * block_q * block_k + 4 * blocks * width
