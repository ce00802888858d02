"""Softmax attention: ours beside cuDNN, tokamax, XLA's and PyTorch's.

    attnjax benchmark attention --torch-python ~/torch/bin/python

All take turns, so that whatever else the machine does falls on each alike: judge by the ratios.
Gradients are timed together with the forward on a CPU, alone on accelerators.
"""

import dataclasses
import functools

from experiments.measuring import attention
from experiments.measuring import cases as benchmark_cases
from experiments.measuring import run as benchmark_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(benchmark_run.Options):
    """Softmax attention of several libraries: medians of interleaved runs."""

    lengths: tuple[int, ...] = ()
    """Queries, and as many keys, of one sequence, full and causal. Where none is given: on a CPU
    256 to 8192, on accelerators the shapes that others publish, of batches too, and with masks."""
    head_dims: tuple[int, ...] = (64, 128)
    """Features of a head, with --lengths and on a CPU."""
    heads: int = 8
    """Heads of queries, keys and values, with --lengths and on a CPU."""
    largest_dense: int | None = None
    """Length up to which dense and jax.nn take part, which hold whole matrices. Where None: 8192 on
    a CPU (10 GB), 16384 on accelerators."""


def run(config: Config) -> int:
    """Measures, prints a table and writes the files; 2 for a torch_python that has no torch."""
    large = benchmark_run.accelerated()
    ours = ("default", "pallas", "blocked") if large else ("blocked", "dense")
    most = config.largest_dense
    most = (16384 if large else 8192) if most is None else most
    entries = functools.partial(attention.entries, ours=ours, most=most)
    return benchmark_run.run("attention", config, cases(config), entries, ours=ours[0])


def cases(config: Config) -> list[benchmark_cases.Case]:
    """What is measured here."""
    large = benchmark_run.accelerated()
    lengths = config.lengths or ((64, 256) if config.quick else (256, 512, 1024, 4096, 8192))
    shapes = [
        benchmark_cases.shape(length, config.heads, head_dim, mask=mask)
        for length in lengths
        for head_dim in config.head_dims
        for mask in ("causal", "full")
    ]
    if large and not config.lengths and not config.quick:
        shapes = benchmark_cases.PLAIN + benchmark_cases.MASKED + benchmark_cases.FOLDING
    ways = ("forward", "backward" if large else "forward+backward")
    dtype = benchmark_run.dtype()
    return [benchmark_cases.Case(way=way, dtype=dtype, **shape) for shape in shapes for way in ways]
