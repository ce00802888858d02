"""Attention to blocks of keys that are chosen, beside attention to all of them.

    attnjax benchmark block_sparse

Each block of queries sees as many blocks of keys, drawn at random for it and each head. They are
given as a list ("xla", "pallas") and as a mask; "dense" is our attention without a mask.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import masks
from attnjax.ops import dot_product_attention, selected_block_attention
from experiments.measuring import attention
from experiments.measuring import cases as benchmark_cases
from experiments.measuring import run as benchmark_run
from experiments.measuring.torch_peer import Torch
from experiments.measuring.turns import Entry, of_jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(benchmark_run.Options):
    """Block-sparse attention with a random selection, and dense attention."""

    lengths: tuple[int, ...] = ()
    """Queries, and as many keys. Where none is given: 4096 on a CPU, 65536 else."""
    heads: int = 8
    """Heads of queries, keys and values."""
    head_dim: int = 128
    """Features of a head."""
    block: int = 128
    """Queries, and keys, of a block."""
    sparsity: int = 16
    """One of so many blocks of keys is chosen."""

    def __post_init__(self):
        least = self.block * self.sparsity
        if any(length % least for length in self.lengths):
            raise ValueError(f"{self.lengths=} must be multiples of block x sparsity = {least}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(benchmark_cases.Case):
    """One thing to time."""

    block: int
    chosen: int
    """Blocks of keys for each block of queries."""

    def __str__(self):
        return f"{super().__str__()}, {self.chosen} of {self.length // self.block} blocks"


def run(config: Config) -> int:
    """Measures, prints a table and writes the files; 2 for a torch_python that has no torch."""
    return benchmark_run.run("block_sparse", config, cases(config), entries, ours="xla")


def cases(config: Config) -> list[Case]:
    """What is measured here."""
    large = benchmark_run.accelerated() and not config.quick
    default = 65536 if large else config.block * config.sparsity * (1 if config.quick else 2)
    return [
        Case(
            **benchmark_cases.shape(length, config.heads, config.head_dim),
            block=config.block,
            chosen=length // config.block // config.sparsity,
            way=way,
            dtype=benchmark_run.dtype(),
        )
        for length in config.lengths or (default,)
        for way in ("forward", "backward")
    ]


def entries(case: Case, torch: Torch, *, peers: bool) -> dict[str, Entry]:
    """Both forms of the selection, and dense attention; PyTorch has no part in it."""
    tokens, chosen = benchmark_cases.tokens_of(case), selection(case)
    share = case.chosen * case.block / case.length

    def timed(fn, share, *given):
        work = benchmark_cases.operations(case, share)
        return Entry(of_jax(fn, tokens, case.way, given), work)

    found = {}
    for name in benchmark_run.forms():
        found[name] = timed(
            functools.partial(by_list, case=case, implementation=name), share, chosen
        )
    by = benchmark_run.attention_by()
    for suffix, name in by.items():
        masked = functools.partial(by_mask, case=case, implementation=name)
        found[f"mask{suffix}"] = timed(masked, share, dense_of(case, chosen))
    for name, dense in attention.beside(case, "dense", by, peers=peers).items():
        found[name] = timed(dense, 1, None, None)
    return found


def selection(case: Case) -> jax.Array:
    """Numbers of chosen blocks (batch, blocks of queries, heads, chosen)."""
    count = case.length // case.block
    order = np.random.default_rng(0).random((case.batch, count, case.heads, count)).argsort(-1)
    return jnp.asarray(np.sort(order[..., : case.chosen], -1), "int32")


def dense_of(case: Case, chosen: jax.Array) -> np.ndarray:
    """Whether each is chosen (batch, heads, blocks of queries, blocks of keys)."""
    count = case.length // case.block
    return (np.asarray(chosen)[..., None] == np.arange(count)).any(-2).transpose(0, 2, 1, 3)


def by_list(q, k, v, chosen, *, case, implementation):
    """Attention to the blocks of a list."""
    sizes = dict(block=case.block, query_block=case.block)
    attend = selected_block_attention.selected_block_attention
    return attend(q, k, v, chosen, implementation=implementation, **sizes)


def by_mask(q, k, v, chosen, *, case, implementation):
    """The same, where the blocks are a mask."""
    mask = masks.Blocks(chosen, case.block, case.block)
    attend = dot_product_attention.dot_product_attention
    return attend(q, k, v, mask=mask, implementation=implementation)
