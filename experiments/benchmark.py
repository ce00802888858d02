"""Time exact attention on this machine's CPU, or see how every mechanism scales with the length.

    attnjax benchmark attention --torch-python ~/torch/bin/python
    attnjax benchmark scaling --mechanisms gqa retention

`attention` is ours, jax.nn's, PyTorch's, and the dense form. All see the same shapes (batch 1,
float32) and take turns, so that whatever else the machine does falls on each alike: judge by the
ratios. Writes JSON, and a plot beside it. `scaling` is in experiments/scaling.py.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

from experiments import benchmark_results, scaling
from experiments import config as configs

OURS = "blocked"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Exact attention of several libraries: medians of interleaved runs."""

    lengths: tuple[int, ...] = (256, 512, 1024, 4096, 8192)
    """Queries, and as many keys."""
    head_dims: tuple[int, ...] = (64, 128)
    """Features of a head."""
    heads: int = 8
    """Heads of queries, keys and values."""
    runs: int = 7
    """Runs of each at least, after one that is not counted."""
    seconds: float = 2.0
    """Short runs are repeated for so long, for each case."""
    largest_dense: int = 8192
    """Length up to which dense and jax.nn take part, which hold whole matrices (8192: 10 GB)."""
    torch_python: pathlib.Path | None = None
    """Interpreter that has torch; where None, this one if it has."""
    out: pathlib.Path = configs.ROOT / "docs/benchmarks/attention_cpu.json"
    """Where the numbers go; the plot gets the same name with .png."""
    quick: bool = False
    """Try it out: short lengths, two runs."""


@dataclasses.dataclass(frozen=True, order=True)
class Case:
    """One thing to time."""

    length: int
    head_dim: int
    causal: bool
    backward: bool

    def __str__(self):
        mask = "causal" if self.causal else "full"
        way = "forward+backward" if self.backward else "forward"
        return f"T {self.length}, D {self.head_dim}, {mask}, {way}"


def main(argv=None) -> int:
    """Measures, prints a table and writes the files.

    Gives 0; 1 for a false claim; 2 for a wrong name, or a torch_python that has no torch.
    """
    import tyro

    config = tyro.extras.subcommand_cli_from_dict(
        {"attention": Benchmark, "scaling": scaling.Scaling},
        prog="attnjax benchmark",
        description=__doc__,
        args=sys.argv[1:] if argv is None else argv,
    )
    if isinstance(config, scaling.Scaling):
        return scaling.run(config)
    if config.quick:
        config = dataclasses.replace(config, lengths=(64, 256), runs=2, seconds=0.0)
    try:
        with torch_timer(config) as (torch_version, time_torch):
            results = measure(config, time_torch)
    except FileNotFoundError as error:
        print(f"attnjax benchmark: {error}", file=sys.stderr)
        return 2
    benchmark_results.write(config, results, torch_version, ours=OURS)
    return 0


@contextlib.contextmanager
def torch_timer(config):
    """(version, function from a case to seconds) of another process, so that no threads meet.

    (None, None) where this interpreter has no torch and no other is named. Raises
    FileNotFoundError where the named one has none.
    """
    python = config.torch_python
    if python is None and importlib.util.find_spec("torch"):
        python = sys.executable
    if python is None:
        yield None, None
        return
    program = [python, pathlib.Path(__file__).with_name("torch_timing.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(program, **pipes) as process:
        version = process.stdout.readline().strip()
        if not version:
            raise FileNotFoundError(f"torch_python={str(python)!r} must be a Python with torch")

        def seconds(case):
            line = [case.length, case.head_dim, config.heads, case.causal, case.backward]
            print(json.dumps([*line, os.cpu_count()]), file=process.stdin, flush=True)
            return float(process.stdout.readline())

        yield version, seconds


def measure(config, time_torch):
    """Seconds of every run: {case: {implementation: [seconds]}}."""
    import rich.progress

    cases = itertools.product(config.lengths, config.head_dims, (True, False), (False, True))
    cases = [Case(*x) for x in cases]
    results = {}
    with rich.progress.Progress() as progress:
        bar = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(bar, description=str(case))
            timers = jax_timers(config, case)
            if time_torch is not None:
                timers["torch"] = functools.partial(time_torch, case)
            results[case] = take_turns(timers, config.runs, config.seconds)
            progress.advance(bar)
    return results


def take_turns(timers, runs, seconds):
    """{name: [seconds]} of at least `runs` rounds in which each timer runs once."""
    for timer in timers.values():
        timer()  # compiles, and warms caches up
    times = {name: [] for name in timers}
    end = time.perf_counter() + seconds
    while len(times[OURS]) < runs or time.perf_counter() < end:
        for name, timer in timers.items():
            times[name].append(timer())
    return times


def jax_timers(config, case):
    """{implementation: function that runs a case once and returns its seconds}."""
    import jax

    from attnjax.core import masks
    from attnjax.ops import dot_product_attention as ops

    mask = masks.Causal() if case.causal else None
    ours = functools.partial(ops.dot_product_attention, mask=mask)
    functions = {OURS: functools.partial(ours, implementation="blocked")}
    if case.length <= config.largest_dense:
        functions["dense"] = functools.partial(ours, implementation="dense")
        functions["jax.nn"] = functools.partial(
            jax.nn.dot_product_attention, is_causal=case.causal, implementation="xla"
        )
    shape = 1, case.length, config.heads, case.head_dim
    arrays = [jax.random.normal(jax.random.key(i), shape) for i in range(4)]

    def timer(f):
        forward = lambda q, k, v, do: f(q, k, v)
        backward = lambda q, k, v, do: jax.vjp(f, q, k, v)[1](do)
        step = jax.jit(backward if case.backward else forward)

        def seconds():
            start = time.perf_counter()
            jax.block_until_ready(step(*arrays))
            return time.perf_counter() - start

        return seconds

    return {name: timer(f) for name, f in functions.items()}


if __name__ == "__main__":
    sys.exit(main())
