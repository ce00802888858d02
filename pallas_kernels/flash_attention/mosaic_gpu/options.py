"""What the kernels of attention are told, beside what goes through shared memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pallas_kernels.flash_attention.mosaic_gpu.sheet import Sheet


class Options(NamedTuple):
    """What is known while tracing."""

    scale: float
    softcap: float | None
    visible: Callable | None  # (t, s, *arrays) -> bool, of tiles
    S: int  # keys that exist
    keep: Callable | None = None  # (seed, b, n, t, s) -> bool, of tiles
    rate: float = 0.0  # that `keep` says no
    score_mod: Callable | None = None  # (score, t, s, factors, numbers) -> score, of tiles


class Asked(NamedTuple):
    """What stays in global memory: of the mask, dropout, bias, score_mod; None is not needed."""

    t: Sheet | None
    s: Sheet | None
    arrays: tuple[Sheet, ...]
    seed: Any = None  # two numbers
    bias: Sheet | None = None  # of rows or of columns
    factors: tuple[Sheet, ...] = ()
    numbers: tuple[Sheet, ...] = ()
