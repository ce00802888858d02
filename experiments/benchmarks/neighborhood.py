"""Neighborhood attention over images and videos, beside attention to everything.

    attnjax benchmark neighborhood

`gna` in the two forms of its own, and as a mask of softmax attention; "dense" has no mask.
The large grids have as many tokens as an image of FLUX at 4k and a video of HunyuanVideo; about a
tenth of them is seen.
"""

import dataclasses
import functools
import math

from attnjax.core import masks, registry
from attnjax.ops import dot_product_attention
from experiments.measuring import attention
from experiments.measuring import cases as benchmark_cases
from experiments.measuring import run as benchmark_run
from experiments.measuring.torch_peer import Torch
from experiments.measuring.turns import Entry, of_jax

_SMALL = (
    dict(grid=(32, 32), window=(7, 7), stride=(1, 1)),
    dict(grid=(8, 16, 16), window=(4, 8, 8), stride=(4, 8, 8)),
)
_LARGE = (
    dict(grid=(256, 256), window=(80, 80), stride=(1, 1)),
    dict(grid=(256, 256), window=(80, 80), stride=(16, 16)),
    dict(grid=(30, 48, 80), window=(18, 24, 24), stride=(16, 8, 8)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(benchmark_run.Options):
    """Neighborhood attention, and dense attention."""

    heads: int | None = None
    """Heads of queries, keys and values; where None 4 on a CPU, 24 else."""
    head_dim: int | None = None
    """Features of a head; where None 32 on a CPU, 128 else."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(benchmark_cases.Case):
    """One thing to time."""

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]

    def __str__(self):
        sizes = ["x".join(map(str, x)) for x in (self.grid, self.window, self.stride)]
        grid = f"{sizes[0]}, window {sizes[1]}, stride {sizes[2]}"
        return f"N {self.heads}, H {self.head_dim}, {grid}, {self.way}"


def run(config: Config) -> int:
    """Measures, prints a table and writes the files; 2 for a torch_python that has no torch."""
    return benchmark_run.run("neighborhood", config, cases(config), entries, ours="xla")


def cases(config: Config) -> list[Case]:
    """What is measured here."""
    large = benchmark_run.accelerated() and not config.quick
    sizes = config.heads or (24 if large else 4), config.head_dim or (128 if large else 32)
    return [
        Case(
            **benchmark_cases.shape(math.prod(grid["grid"]), *sizes),
            **grid,
            way=way,
            dtype=benchmark_run.dtype(),
        )
        for grid in (_LARGE if large else _SMALL)
        for way in ("forward", "backward")
    ]


def entries(case: Case, torch: Torch, *, peers: bool) -> dict[str, Entry]:
    """Ours in each form, and dense attention; PyTorch has no part in it."""
    tokens = benchmark_cases.tokens_of(case)
    share = math.prod(case.window) / case.length

    def timed(fn, share, *given):
        return Entry(of_jax(fn, tokens, case.way, given), benchmark_cases.operations(case, share))

    found = {}
    for name in benchmark_run.forms():
        found[name] = timed(functools.partial(by_gna, case=case, implementation=name), share)
    by = benchmark_run.attention_by()
    for suffix, name in by.items():
        masked = functools.partial(by_mask, case=case, implementation=name)
        found[f"mask{suffix}"] = timed(masked, share)
    for name, dense in attention.beside(case, "dense", by, peers=peers).items():
        found[name] = timed(dense, 1, None, None)
    return found


def by_gna(q, k, v, *, case, implementation):
    """Neighborhood attention of the tokens (B T N H), on their grid."""
    q, k, v = (x.reshape(case.batch, *case.grid, *x.shape[2:]) for x in (q, k, v))
    options = dict(window=case.window, stride=case.stride, implementation=implementation)
    return registry.get("gna").fn(q, k, v, **options)


def by_mask(q, k, v, *, case, implementation):
    """The same, where neighborhoods are a mask."""
    mask = masks.Neighborhood(case.grid, case.window, case.stride)
    attend = dot_product_attention.dot_product_attention
    return attend(q, k, v, mask=mask, implementation=implementation)
