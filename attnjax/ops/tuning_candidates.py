"""Implementations and tiles that an operation could take, by platform.

The first of an implementation takes the sizes of today's rules.
"""

import importlib.util
from typing import NamedTuple


class Candidate(NamedTuple):
    """An implementation with tiles, which are (name, size) each."""

    implementation: str
    tiles: tuple[tuple[str, int], ...] = ()

    def __str__(self):
        return " ".join([self.implementation, *(f"{name}={size}" for name, size in self.tiles)])


def _by(implementation, **sizes):
    """One without tiles, by rule, and one for each size of each tile, the others being by rule."""
    pairs = [(name, size) for name, of in sizes.items() for size in of]
    return [Candidate(implementation), *(Candidate(implementation, (x,)) for x in pairs)]


def _squares(*sizes):
    return _pairs(*((x, x) for x in sizes))


def _pairs(*sizes):
    """Of so many queries and keys."""
    return [Candidate("pallas", (("block_q", q), ("block_k", k))) for q, k in sizes]


def _recurrent(*chunks):
    """XLA's form and the kernel, which refuses chunks that it can't."""
    by = {x: [Candidate(x, (("chunk", size),)) for size in chunks] for x in ("xla", "pallas")}
    return _either(by["xla"], tpu=by["pallas"], cuda=by["pallas"])


def _either(xla, *, tpu, cuda):
    """XLA's form anywhere, and the kernel that there is for a platform."""
    return {"cpu": xla, "cuda": xla + cuda, "tpu": xla + tpu}


_BLOCKED = [Candidate("blocked", (("block", x),)) for x in (512, 128, 256, 1024)]
_COLUMNS = [Candidate("pallas", (("block_k", x),)) for x in (128, 64, 32)]
_TOKAMAX = [Candidate("tokamax")] * bool(importlib.util.find_spec("tokamax"))
CANDIDATES = {
    "linear_recurrence": _recurrent(64, 32, 128),
    "decay_attention": _recurrent(128, 64, 256),
    "selective_scan": _recurrent(64, 32, 128),
    "dot_product_attention": {
        "cpu": [Candidate("dense"), *_BLOCKED],
        "cuda": [Candidate("dense"), *_BLOCKED, Candidate("cudnn"), *_TOKAMAX, *_COLUMNS],
        "tpu": [Candidate("dense"), *_BLOCKED, *_TOKAMAX, *_squares(1024, 512, 256, 2048)],
    },
    "block_sparse_attention": _either(
        _by("xla", block_q=(32, 64, 128, 256)),
        tpu=_by("pallas")
        + _squares(256, 128)
        + _pairs((256, 512), (512, 256), (256, 1024), (1024, 512)),
        cuda=_by("pallas"),
    ),
    "decode_attention": _either(
        _by("xla", keys=(128, 512, 1024), rows=(64, 1024)),
        tpu=_by("pallas", keys=(256, 512, 2048)),
        cuda=_by("pallas", keys=(32, 16), blocks=(66, 264, 528)),
    ),
    "neighborhood_attention": _either(
        _by("xla"),
        tpu=_by("pallas", pack=(1, 2, 4), packs=(1, 4, 16)),
        cuda=_by("pallas", pack=(1, 2, 4)),
    ),
}
