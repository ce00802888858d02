"""Whether measurements meet the bars.

Where a time that a bar takes isn't there, it is unmeasured, whatever else is: a library that wasn't
timed was not beaten.
"""

import dataclasses
import itertools
import json
import pathlib
from typing import Literal

from experiments.measuring import bars as benchmark_bars


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is known of a bar."""

    bar: benchmark_bars.Bar
    value: float | None
    said: Literal["met", "missed", "unmeasured"]


def judge(bar: benchmark_bars.Bar, page: dict | None) -> Verdict:
    """What a benchmark's page says of a bar; nothing where there is none."""
    value = None
    if page is not None and benchmark_bars.DEVICE in page["device"]["kind"]:
        wanted = bar.case.items()
        rows = [row for row in page["cases"] if all(row.get(name) == x for name, x in wanted)]
        value = bar.value(rows[0]) if rows else None
    if value is None:
        return Verdict(bar, None, "unmeasured")
    return Verdict(bar, value, "met" if value >= bar.least else "missed")


def newest(folder: pathlib.Path) -> dict[str, dict]:
    """The last page of each benchmark with bars that was written on such a device."""
    known = {bar.benchmark for bar in benchmark_bars.BARS}
    pages = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    pages = [page for page in pages if "benchmark" in page and page["benchmark"] in known]
    pages = [page for page in pages if benchmark_bars.DEVICE in page["device"]["kind"]]
    return {page["benchmark"]: page for page in sorted(pages, key=lambda page: page["date"])}


def show(verdicts: list[Verdict]):
    """A line for each verdict, below the bar and the command that measures it."""
    of_command, of_bar = (lambda x: x.bar.command), (lambda x: (x.bar.what, x.bar.least))
    for command, group in itertools.groupby(verdicts, of_command):
        print(command)
        for (what, least), cases in itertools.groupby(group, of_bar):
            print(f"  {what}: {least:.3g} at least")
            for x in cases:
                found = "" if x.value is None else f"{x.value:.3g}"
                print(f"    {x.said:10} {found:>6}  {about(x.bar)}")


def about(bar: benchmark_bars.Bar) -> str:
    """Its case, without what goes without saying."""
    case = dict(bar.case)
    usual = dict(batch=1, bias=False, kv_heads=case["heads"], value_dim=case["head_dim"])
    return ", ".join(f"{name} {x}" for name, x in case.items() if usual.get(name) != x)


def show_of(page: dict):
    """The bars of one benchmark; elsewhere than on such a device, that they say nothing of it."""
    bars = [bar for bar in benchmark_bars.BARS if bar.benchmark == page["benchmark"]]
    if bars and benchmark_bars.DEVICE in page["device"]["kind"]:
        show([judge(bar, page) for bar in bars])
    elif bars:
        where = f"they hold for an {benchmark_bars.DEVICE} (attnjax benchmark bars)"
        print(f"bars unmeasured: {len(bars)}; {where}")
