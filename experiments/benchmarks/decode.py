"""One step of decoding from a long paged cache, beside what a copy reads and writes in the time.

    attnjax benchmark decode

Each sequence has one new query and a full cache. The work is to read that once: rates are in bytes.
Other libraries get the same keys and values in one piece.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attnjax.core import paging
from attnjax.ops import decode_attention
from experiments.measuring import attention
from experiments.measuring import cases as benchmark_cases
from experiments.measuring import run as benchmark_run
from experiments.measuring.torch_peer import Torch
from experiments.measuring.turns import Entry, of_jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(benchmark_run.Options):
    """Decoding from a paged cache, and copying."""

    lengths: tuple[int, ...] = ()
    """Tokens in the cache of each sequence. Where none is given: 2048 on a CPU, 32768 else."""
    batch: int | None = None
    """Sequences; where None 4 on a CPU, 64 else."""
    heads: int = 32
    """Heads of queries."""
    kv_heads: int = 8
    """Heads of keys and values."""
    head_dim: int = 128
    """Features of a head."""
    page_size: int = 128
    """Tokens of a page."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(benchmark_cases.Case):
    """One thing to time."""

    page_size: int

    def __str__(self):
        size = f"B {self.batch}, T {self.length}, N {self.heads}/{self.kv_heads}"
        return f"{size}, H {self.head_dim}, pages of {self.page_size}"


def run(config: Config) -> int:
    """Measures, prints a table and writes the files; 2 for a torch_python that has no torch."""
    unit = benchmark_run.UNITS[1]
    return benchmark_run.run("decode", config, cases(config), entries, ours="xla", unit=unit)


def cases(config: Config) -> list[Case]:
    """What is measured here."""
    large = benchmark_run.accelerated() and not config.quick
    default = 32768 if large else 256 if config.quick else 2048
    shape = functools.partial(
        benchmark_cases.shape, batch=config.batch or (64 if large else 4), kv_heads=config.kv_heads
    )
    more = dict(page_size=config.page_size, way="forward", dtype=benchmark_run.dtype())
    lengths = config.lengths or (default,)
    return [Case(**shape(length, config.heads, config.head_dim), **more) for length in lengths]


def entries(case: Case, torch: Torch, *, peers: bool) -> dict[str, Entry]:
    """Ours by `implementation`, a copy of as much memory, other libraries; no PyTorch."""
    draw = functools.partial(benchmark_cases.draw, dtype=case.dtype)
    q = draw(0, (case.batch, 1, case.heads, case.head_dim))
    k, v = (draw(i, (case.batch, case.length, case.kv_heads, case.head_dim)) for i in (1, 2))
    cache = filled(k, v, case.page_size)
    size = k.nbytes + v.nbytes
    timed = lambda fn, *arrays: Entry(of_jax(fn, arrays, case.way), size)
    found = {}
    for name in benchmark_run.forms():
        step = functools.partial(decode_attention.decode_attention, implementation=name)
        found[name] = timed(step, q, cache)
    found["copy"] = Entry(of_jax(jnp.negative, (k,), case.way), 2 * k.nbytes)
    if peers:
        for name in attention.LIBRARIES:
            attend = functools.partial(attention.by_library, case=case, name=name)
            found[name] = timed(attend, q, k, v, None, None)
    return found


@functools.partial(jax.jit, static_argnums=2)
def filled(k: jax.Array, v: jax.Array, page_size: int) -> paging.PagedCache:
    """A full cache of these tokens (B T K H)."""
    sizes = dict(H=k.shape[-1], V=v.shape[-1], dtype=k.dtype, page_size=page_size)
    return paging.PagedCache.empty(*k.shape[:3], **sizes).append(k, v)
