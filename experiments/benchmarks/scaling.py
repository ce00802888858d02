"""How time and memory of each mechanism grow with the length, beside what its record claims.

For each mechanism over sequences or grids: its function and the gradient, on its record's example,
at growing lengths. Memory is what XLA sets aside for the compiled step beside its arguments and
results; it is exact and needs no run. Time is the fastest of a few runs. An exponent is the slope
of a least-squares line through the logarithms: 1 is linear, 2 quadratic.
"""

import ctypes
import dataclasses
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import registry
from attnjax.core.registry import Claim
from experiments import config as configs
from experiments.measuring import results

# glibc's mallopt: keep freed memory; take none by mmap; one heap for all threads
_MALLOPT = {-1: 2**31 - 1, -4: 0, -8: 1}

CLAIMS = {"seconds": Claim.LINEAR_COMPUTE, "bytes": Claim.LINEAR_MEMORY}


@dataclasses.dataclass(frozen=True)
class Config:
    """Exponents of time and memory; exit code 1 where one is above a claim to be linear."""

    mechanisms: tuple[str, ...] = ()
    """Names, whose rows in the file are renewed; where none is given, all of sequences or grids."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    """Lengths of the record's example, growing."""
    fitted_from: int = 1024
    """An exponent is fitted to lengths from here on: where windows and selections are full."""
    runs: int = 3
    """Runs of each, after one that is not counted."""
    seconds: float = 1.0
    """A mechanism with a run longer than this gets no longer input."""
    gigabytes: float = 4.0
    """A step that needs more memory than this is not run, and none of a longer input compiled."""
    most: float = 1.15
    """The largest exponent that a claim to be linear allows."""
    out: pathlib.Path = configs.ROOT / "docs/benchmarks/scaling_cpu.json"
    """Where the numbers go."""

    def __post_init__(self):
        fitted = [length for length in self.lengths if length >= self.fitted_from]
        if len(fitted) < 2 or list(self.lengths) != sorted(self.lengths):
            raise ValueError(f"{self.lengths=} must grow, two or more from {self.fitted_from=} on")


def run(config: Config) -> int:
    """Measures, prints a table and writes the file; 1 for a false claim, 2 for a wrong name."""
    import rich.progress

    try:
        names = select(config.mechanisms)
        others = kept(config, names)
    except ValueError as error:
        print(f"attnjax benchmark: {error}", file=sys.stderr)
        return 2
    keep_memory()
    rows = []
    with rich.progress.Progress() as progress:
        bar = progress.add_task("", total=len(names))
        for name in names:
            progress.update(bar, description=name)
            rows.append(judge(name, measure(registry.get(name), config), config))
            progress.advance(bar)
    show(rows)
    write(sorted([*others, *rows], key=lambda row: row["name"]), config)
    return int(any(row["false_claims"] for row in rows))


def select(mechanisms: tuple[str, ...]) -> list[str]:
    """Full names; ValueError for what is no mechanism over sequences or grids."""
    records = registry.of_kind(registry.Mechanism)
    known = [name for name, record in records.items() if record.layout in ("sequence", "grid")]
    names = [registry.full_name(name) for name in mechanisms] or known
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} must be a mechanism over sequences or grids")
    return names


def keep_memory():
    """Lets freed memory stay with this process, where the C library is Linux' glibc.

    Large arrays would else be given back after each run, and fetched page by page in the next:
    from some length on a run would take twice as long for each token, whatever the mechanism.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, value in _MALLOPT.items() if mallopt else ():
        mallopt(option, value)


def measure(record: registry.Mechanism, config: Config) -> list[dict]:
    """{length, bytes, seconds} by length, up to the first that is over a limit.

    Seconds are None where the memory limit forbids to run it.
    """
    points = []
    for length in config.lengths:
        args = record.example(jax.random.key(0), length)
        step = jax.jit(_with_gradient(record.fn)).lower(args).compile()
        size = step.memory_analysis().temp_size_in_bytes
        fits = size <= config.gigabytes * 1e9
        seconds = fastest(step, args, config.runs) if fits else None
        points.append({"length": length, "bytes": size, "seconds": seconds})
        if seconds is None or seconds > config.seconds:
            break
    return points


def _with_gradient(fn):
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)

    def step(args):
        learned = {name: x for name, x in args.items() if is_float(x)}
        loss = lambda learned: sum(
            x.astype(jnp.float32).sum() for x in jax.tree.leaves(fn(**(args | learned)))
        )
        return jax.value_and_grad(loss)(learned)

    return step


def fastest(step, args, runs: int) -> float:
    """Seconds of the fastest of `runs` calls, after one that isn't counted."""
    jax.block_until_ready(step(args))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(step(args))
        times.append(time.perf_counter() - start)
    return min(times)


def exponent(lengths, values, first: int) -> float | None:
    """The slope in logarithms from length `first` on; None where that is not two points."""
    pairs = zip(lengths, values, strict=True)
    pairs = np.log([(n, max(x, 1e-9)) for n, x in pairs if x is not None and n >= first])
    return float(np.polyfit(*pairs.T, 1)[0]) if len(pairs) > 1 else None


def judge(name: str, points: list[dict], config: Config) -> dict:
    """What was measured of a mechanism, its exponents and which claims they belie."""
    lengths = [point["length"] for point in points]
    claims = registry.get(name).claims
    row = {"name": name, "points": points, "exponents": {}, "claims": [], "false_claims": []}
    for what, claim in CLAIMS.items():
        found = exponent(lengths, [point[what] for point in points], config.fitted_from)
        row["exponents"][what] = found
        if claim in claims:
            row["claims"].append(claim.name)
            if found is not None and found > config.most:
                row["false_claims"].append(claim.name)
    return row


def show(rows: list[dict]):
    """A line for each mechanism: its exponents, and whether they were claimed to be 1."""
    import rich.console
    import rich.table

    table = rich.table.Table(title="exponents (and whether claimed to be linear)")
    for name in ("mechanism", "time exponent", "memory exponent", "longest", "ms", "MB"):
        table.add_column(name, overflow="fold")  # a long name is read whole
    for row in rows:
        last = row["points"][-1]
        cells = [_cell(row, what) for what in CLAIMS]
        seconds = "-" if last["seconds"] is None else f"{1e3 * last['seconds']:.1f}"
        size = f"{last['bytes'] / 1e6:.1f}"
        table.add_row(row["name"], *cells, str(last["length"]), seconds, size)
    rich.console.Console(soft_wrap=True).print(table)


def _cell(row, what):
    found, claim = row["exponents"][what], CLAIMS[what].name
    text = "-" if found is None else f"{found:.2f}"
    if claim in row["false_claims"]:
        return f"[red]{text} (claimed linear: false)[/red]"
    return f"{text} (claimed linear)" if claim in row["claims"] else text


def kept(config: Config, names: list[str]) -> list[dict]:
    """Rows that config.out has already of others than `names`, where only some are measured.

    Raises ValueError where those were measured elsewhere or otherwise.
    """
    if not config.mechanisms or not config.out.exists():
        return []
    page = json.loads(config.out.read_text())
    rows = page.pop("mechanisms")
    if page != _circumstances(config):
        raise ValueError(
            f"{config.out.name} has another machine, versions or settings: name another with --out"
        )
    return [row for row in rows if row["name"] not in names]


def write(rows: list[dict], config: Config):
    """The JSON file config.out: machine, versions, settings and a row for each mechanism."""
    page = _circumstances(config) | {"mechanisms": rows}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(page, indent=1) + "\n")
    print(f"wrote {config.out}")


def _circumstances(config):
    """All that rows of one file have in common, as JSON reads it back."""
    settings = {k: v for k, v in vars(config).items() if k not in ("mechanisms", "out")}
    page = {
        "machine": results.machine(),
        "versions": results.versions(),
        "config": settings,
    }
    return json.loads(json.dumps(page))
