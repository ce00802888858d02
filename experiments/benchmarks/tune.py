"""Which implementation and tiles are fastest on the device at hand: makes the table of its kind.

    attnjax benchmark tune
    attnjax benchmark tune --head-dims 128 --dtypes bfloat16 --out table.json

Each candidate computes gradients, of attention with a causal mask and without, of recurrences with
decays by head and by channel, and so on (`ops.tuning_calls`), or of decoding one step. They take
turns; what counts is the geometric mean of the medians. Of candidates that are the same program,
which short sequences make of large tiles, only the first is timed. A row says how busy the machine
was.
"""

import dataclasses
import itertools
import pathlib
import statistics
import sys

import jax

from attnjax.ops import tuning
from experiments.measuring import results, turns
from experiments.measuring import run as benchmark_run

_AT_ONCE = 0.02  # seconds: shorter steps are repeated, as a launch would count for much of them


@dataclasses.dataclass(frozen=True)
class Config:
    """The fastest implementation and tiles on this device, as the table that is asked for them."""

    operations: tuple[str, ...] = tuning.OPERATIONS
    """What to measure."""
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    """Queries, and as many keys: a row is for the lengths above the one before, up to its own."""
    head_dims: tuple[int, ...] = (64, 128)
    """Features of a head."""
    dtypes: tuple[str, ...] = ()
    """Where none is given, float32 on a CPU and bfloat16 elsewhere."""
    heads: int = 8
    """Heads of queries, keys and values; a quarter as many of keys and values in decoding."""
    runs: int = 5
    """Runs of each at least, after one that is not counted."""
    seconds: float = 0.5
    """Short runs are repeated for so long, for each case."""
    out: pathlib.Path | None = None
    """Where the table goes. Where None, to the package, which takes it from then on."""
    quick: bool = False
    """Try it out: short lengths, one run; writes nothing but to --out."""

    def __post_init__(self):
        for name in self.operations:
            if name not in tuning.OPERATIONS:
                raise ValueError(f"operation {name!r} must be one of {tuning.OPERATIONS}")
        if list(self.lengths) != sorted(set(self.lengths)) or not self.lengths:
            raise ValueError(f"{self.lengths=} must grow")


def run(config: Config) -> int:
    """Measures, says what changed and writes the table; 2 where it can't be written."""
    if config.quick:
        config = dataclasses.replace(config, lengths=(64, 128), runs=1, seconds=0.0)
    about = results.circumstances()  # the load is that before the first run
    rows, lines = measure(config, about)
    print(*lines, sep="\n")
    if config.quick and config.out is None:
        return 0
    try:
        print(f"wrote {tuning.write(rows, config.out)}")
    except OSError as error:
        print(f"attnjax benchmark: {error}; name another file with --out", file=sys.stderr)
        return 2
    return 0


def measure(config: Config, about: dict) -> tuple[list, list[str]]:
    """(the table's rows, lines that say what changed)"""
    import rich.progress

    dtypes = config.dtypes or (benchmark_run.dtype(),)
    cases = itertools.product(config.operations, dtypes, config.head_dims, config.lengths)
    cases = [tuning.Case(*x) for x in cases]
    rows, lines = [], []
    with rich.progress.Progress() as progress:
        bar = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(bar, description=str(case))
            seconds, refused = times(case, config)
            found = ranked(case, seconds, about)
            rows += found
            lines += [f"{case}: no time of {name}: {why}" for name, why in refused.items()]
            lines.append(f"{case}: {changed(case, found)}")
            progress.advance(bar)
    return rows, lines


def times(case: tuning.Case, config: Config) -> tuple[dict, dict]:
    """({candidate: seconds of a step}, {candidate: why it has none}); see `distinct`."""
    arrays = tuning.arrays(case, config.heads)
    found, refused = distinct(case, arrays)
    if len(found) < 2:  # nothing to choose from
        return {}, refused
    medians = {candidate: [] for candidate in found}
    limits = dict(runs=config.runs, seconds=config.seconds, at_once=_AT_ONCE)
    for name in next(iter(found.values()), ()):
        entries = {
            candidate: turns.Entry(turns.of_jax(steps[name], arrays, "forward"), work=0.0)
            for candidate, steps in found.items()
        }
        seconds, why = turns.take_turns(entries, **limits)
        refused |= why
        for candidate, runs in seconds.items():
            medians[candidate].append(statistics.median(runs))
    kept = {x: statistics.geometric_mean(m) for x, m in medians.items() if x not in refused}
    return kept, refused


def distinct(case: tuning.Case, arrays: tuple) -> tuple[dict, dict]:
    """({candidate: its steps}, {candidate: why it can't be had}), the first of equal programs."""
    programs, refused = {}, {}
    for candidate in tuning.candidates(case):
        steps = tuning.steps(case, candidate)
        try:
            text = tuple(jax.jit(step).lower(*arrays).as_text() for step in steps.values())
        except Exception as error:  # a kernel may raise anything that its compiler does
            refused[candidate] = turns.reason(error)
        else:
            programs.setdefault(text, (candidate, steps))
    return dict(programs.values()), refused


def ranked(case: tuning.Case, seconds: dict, about: dict) -> list:
    """Rows of each implementation's fastest candidate, from the fastest on.

    The ratio is the time of the best other candidate, of any implementation, to its own.
    """
    if len(seconds) < 2:  # nothing was chosen
        return []
    order = sorted(seconds, key=seconds.get)
    best = {}
    for candidate in order:
        best.setdefault(candidate.implementation, candidate)
    rows = []
    for candidate in best.values():
        other = order[1] if candidate == order[0] else order[0]
        ratio = round(seconds[other] / seconds[candidate], 3)
        rows.append(tuning.row(case, candidate, source(about) | {"ratio": ratio}))
    return rows


def source(about: dict) -> dict:
    """What a measured row must say, and how many processes wanted to run beside it."""
    machine, device, versions = (about[name] for name in ("machine", "device", "versions"))
    on_cpu = device["platform"] == "cpu"
    return {
        "how": "measured",
        "device": f"{machine['cpu']}, {machine['cores']} cores" if on_cpu else device["kind"],
        "driver": device.get("driver_version") or versions.get("libtpu") or machine["platform"],
        "jax": versions["jax"],
        "date": about["date"][:10],
        "load": round(about["load"][0], 1),
    }


def changed(case: tuning.Case, rows: list) -> str:
    """What is chosen now, and what was before."""
    if not rows:
        return "nothing to choose from"
    now, before = rows[0], tuning.chosen(case)
    name = tuning.Candidate(now.implementation, tuple(now.tiles.items()))
    was = "as before" if name == before else f"before: {before or 'by rule'}"
    return f"{name}, {now.source['ratio']:.2f} times as fast as the next ({was})"
