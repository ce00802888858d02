"""What the benchmarks of operations have in common: their options, and from cases to results."""

import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments import config as configs
from experiments.measuring import results, torch_peer, turns, verdicts

UNITS = "operations a second", "bytes a second"
_AT_ONCE = 0.02  # seconds of work that an accelerator is given at once: launches are hidden


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure, and where results go."""

    runs: int = 7
    """Runs of each at least, after one that is not counted."""
    seconds: float = 2.0
    """Short runs are repeated for so long, for each case."""
    peers: bool = True
    """Other libraries too; why one can't be imported or refuses a case is shown and kept."""
    torch_python: pathlib.Path | None = None
    """Interpreter that has torch (and fla); where None, this one if it has."""
    out: pathlib.Path | None = None
    """Where the numbers go; the plot gets the same name with .png. Where None, docs/benchmarks, by
    benchmark and device; nowhere with --quick."""
    quick: bool = False
    """Try it out: small cases, two runs."""


def accelerated() -> bool:
    """Whether this is a machine for the large cases."""
    return jax.default_backend() != "cpu"


def dtype() -> str:
    """What is usual on this platform."""
    return "bfloat16" if accelerated() else "float32"


def forms() -> tuple[str, ...]:
    """Implementations to time of an operation that has a kernel."""
    return ("xla", "pallas") if accelerated() else ("xla",)


def attention_by() -> dict[str, str | None]:
    """Implementations of our attention to time, by what is added to a name: "" is the default's."""
    return {"": None} | ({" pallas": "pallas"} if accelerated() else {})


def run(
    benchmark: str,
    config: Options,
    cases: Sequence[Any],
    entries: Callable[..., dict[str, turns.Entry]],
    *,
    ours: str,
    unit: str = UNITS[0],
) -> int:
    """Measures cases, shows and writes them and the bars; 2 for a torch_python without torch.

    Args:
      cases: dataclasses of what JSON can hold, whose str is short.
      entries: (case, torch, *, peers) -> the implementations of a case; those with PyTorch use
        torch, and without peers there are ours alone.
      ours: the implementation that others are compared with.
      unit: of the rate at which `Entry.work` is done.
    """
    about = results.circumstances()  # the load is that before the first run
    try:
        with torch_peer.opened(config.torch_python) as torch:
            find = lambda case: entries(case, torch, peers=config.peers)
            rows = measure(config, cases, find, ours)
    except FileNotFoundError as error:
        print(f"attnjax benchmark: {error}", file=sys.stderr)
        return 2
    about["versions"]["torch"] = torch.version
    settings = {k: v for k, v in vars(config).items() if k not in ("torch_python", "out")}
    how = {"config": settings, "ours": ours, "unit": unit}
    page = {"benchmark": benchmark, **about, **how, "cases": rows}
    labels = [str(case) for case in cases]
    results.show(page, labels)
    if config.out or not config.quick:
        results.write(page, labels, config.out or default_out(page))
    verdicts.show_of(page)
    return 0


def measure(config: Options, cases: Sequence[Any], entries: Callable, ours: str) -> list[dict]:
    """A row for each case."""
    import rich.progress

    limits = {"runs": 2, "seconds": 0.0} if config.quick else vars(config)
    limits = {name: limits[name] for name in ("runs", "seconds")}
    at_once = _AT_ONCE if accelerated() else 0.0
    rows = []
    with rich.progress.Progress() as progress:
        bar = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(bar, description=str(case))
            found = entries(case)
            times, refused = turns.take_turns(found, at_once=at_once, **limits)
            work = {name: entry.work for name, entry in found.items()}
            about = dataclasses.asdict(case)
            rows.append(results.row(about, times, refused, work, ours=ours))
            progress.advance(bar)
    return rows


def default_out(page: dict) -> pathlib.Path:
    """docs/benchmarks/BENCHMARK_DEVICE.json."""
    name = re.sub(r"[^a-z0-9]+", "_", page["device"]["kind"].lower())
    return configs.ROOT / f"docs/benchmarks/{page['benchmark']}_{name}.json"
