"""What this library means to reach on an H100, beside what was measured.

    attnjax benchmark bars

A bar without a measurement is unmeasured; the table says which command measures it.
"""

import dataclasses
import pathlib

from experiments import config as configs
from experiments.measuring import bars
from experiments.measuring import verdicts as benchmark_verdicts


@dataclasses.dataclass(frozen=True)
class Config:
    """Bars of speed, met, missed or unmeasured; exit code 1 where one is missed."""

    folder: pathlib.Path = configs.ROOT / "docs/benchmarks"
    """Where benchmarks wrote their JSON; of each the newest that is of such a device counts."""


def run(config: Config) -> int:
    """Shows all bars; 1 where one is missed."""
    pages = benchmark_verdicts.newest(config.folder)
    verdicts = [benchmark_verdicts.judge(bar, pages.get(bar.benchmark)) for bar in bars.BARS]
    benchmark_verdicts.show(verdicts)
    return int(any(verdict.said == "missed" for verdict in verdicts))
