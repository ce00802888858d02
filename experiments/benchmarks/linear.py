"""The linear recurrence with a decay, beside flash-linear-attention and softmax attention.

    attnjax benchmark linear --torch-python ~/torch/bin/python

S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, where g_t is of the head (scalar) or of each of
its key channels (channel). Softmax attention of the same shape stands beside it.
"""

import dataclasses
import functools
from typing import Literal

import jax

from attnjax.ops import linear_recurrence
from experiments.measuring import attention
from experiments.measuring import cases as benchmark_cases
from experiments.measuring import run as benchmark_run
from experiments.measuring.torch_peer import Torch
from experiments.measuring.turns import Entry, of_jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(benchmark_run.Options):
    """Linear attention with decay: ours, flash-linear-attention's, and softmax attention."""

    lengths: tuple[int, ...] = ()
    """Tokens of a sequence. Where none is given: 512 to 2048 on a CPU, 1024 to 16384 else."""
    heads: int | None = None
    """Heads; where None 4 on a CPU, 96 else."""
    head_dim: int | None = None
    """Features of keys and of values; where None 32 on a CPU, 128 else."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(benchmark_cases.Case):
    """One thing to time."""

    decay: Literal["scalar", "channel"]

    def __str__(self):
        return f"{super().__str__()}, {self.decay} decay"


def run(config: Config) -> int:
    """Measures, prints a table and writes the files; 2 for a torch_python that has no torch."""
    return benchmark_run.run("linear", config, cases(config), entries, ours="xla")


def cases(config: Config) -> list[Case]:
    """What is measured here."""
    large = benchmark_run.accelerated() and not config.quick
    lengths = config.lengths or (
        (1024, 2048, 4096, 8192, 16384) if large else (128,) if config.quick else (512, 1024, 2048)
    )
    sizes = config.heads or (96 if large else 4), config.head_dim or (128 if large else 32)
    shapes = [benchmark_cases.shape(length, *sizes, mask="causal") for length in lengths]
    return [
        Case(decay=decay, way=way, dtype=benchmark_run.dtype(), **shape)
        for shape in shapes
        for decay in ("scalar", "channel")
        for way in ("forward", "backward")
    ]


def entries(case: Case, torch: Torch, *, peers: bool) -> dict[str, Entry]:
    """The recurrence by `implementation`, softmax attention of the same shape, and fla."""
    tokens = benchmark_cases.tokens_of(case)
    shape = *tokens[0].shape[:3], 1 if case.decay == "scalar" else case.head_dim
    log_decay = jax.nn.log_sigmoid(benchmark_cases.draw(3, shape, "float32"))
    work = operations(case)
    found = {}
    for name in benchmark_run.forms():
        fn = functools.partial(recur, implementation=name)
        found[name] = Entry(of_jax(fn, (*tokens, log_decay), case.way), work)
    # to see from which length on the recurrence is faster
    by = benchmark_run.attention_by()
    for name, fn in attention.beside(case, "softmax", by, peers=peers).items():
        work_of = benchmark_cases.operations(case, 0.5)
        found[name] = Entry(of_jax(fn, tokens, case.way, (None, None)), work_of)
    if peers:
        found["fla"] = Entry(lambda: torch.prepare(case.decay, case), work)
    return found


def recur(q, k, v, log_decay, *, implementation):
    """Our recurrence."""
    options = dict(log_decay=log_decay, implementation=implementation)
    return linear_recurrence.linear_recurrence(q, k, v, **options)[0]


def operations(case: Case) -> float:
    """Of the recurrence as it is defined: updates of states, and what is read from them."""
    forward = 4.0 * case.batch * case.length * case.heads * case.head_dim * case.value_dim
    return forward * {"forward": 1, "backward": 2, "forward+backward": 3}[case.way]
