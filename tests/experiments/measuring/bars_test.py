import dataclasses
import json

import pytest

from experiments import benchmark
from experiments.measuring import run, verdicts
from experiments.measuring.bars import BARS

BENCHMARKS = sorted({bar.benchmark for bar in BARS})
NAMES = {
    "attention": ["default", "pallas", "pallas, unmasked", "cudnn", "tokamax", "jax.nn"],
    "linear": ["xla", "pallas", "softmax pallas", "softmax cudnn", "fla"],
    "block_sparse": ["xla", "pallas", "mask", "mask pallas", "dense pallas", "dense cudnn"],
    "decode": ["xla", "pallas", "copy", "cudnn"],
}


def page_of(bar, seconds, rates=None, refused=None, kind="NVIDIA H100 80GB HBM3"):
    rates = {name: 1 / x for name, x in seconds.items()} if rates is None else rates
    row = bar.case | {"median_seconds": seconds, "rate": rates, "refused": refused or {}}
    device = {"kind": kind}
    return {"benchmark": bar.benchmark, "device": device, "date": "1", "cases": [row]}


def bar_of(start):
    return next(bar for bar in BARS if bar.what.startswith(start))


def said(bar, *args, **options):
    return verdicts.judge(bar, page_of(bar, *args, **options)).said


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_bar_is_of_one_case_that_its_command_measures(name, monkeypatch):
    monkeypatch.setattr(run, "accelerated", lambda: True)
    module = benchmark.load(name)
    rows = [dataclasses.asdict(case) for case in module.cases(module.Config())]
    for bar in BARS:
        if bar.benchmark == name:
            found = [row for row in rows if bar.case.items() <= row.items()]
            assert len(found) == 1 and found[0]["dtype"] == "bfloat16", bar
            assert bar.command.startswith(f"attnjax benchmark {name}")


@pytest.mark.parametrize("bar", BARS, ids=lambda bar: f"{bar.benchmark} {bar.what[:20]}")
def test_nothing_is_met_without_its_times(bar):
    seconds = dict.fromkeys(NAMES[bar.benchmark], 1.0)
    ours = {name: 1e-4 for name in ("default", "xla", "pallas") if name in seconds}
    rates = {name: 1e15 if name in ours else 1e3 for name in seconds}
    assert verdicts.judge(bar, None).said == "unmeasured"
    assert said(bar, seconds | ours, rates) == "met"
    assert said(bar, seconds | ours, rates, kind="cpu") == "unmeasured"
    assert said(bar, {}, {}) == "unmeasured"
    slow = {name: 1e4 for name in (*ours, "mask", "mask pallas") if name in seconds}
    rates = {name: 1.0 if name in ours else 1e3 for name in seconds}
    assert said(bar, seconds | slow, rates) == "missed"
    elsewhere = page_of(bar, seconds | ours, rates)
    elsewhere["cases"][0]["length"] = 7
    assert verdicts.judge(bar, elsewhere).said == "unmeasured"


def test_a_peer_without_a_time_was_not_beaten():
    bar = bar_of("plain attention")
    seconds = {"default": 1.0, "cudnn": 1.5, "jax.nn": 9.0}
    absent = {"tokamax": "ModuleNotFoundError: No module named 'tokamax'"}
    assert said(bar, seconds) == said(bar, seconds, refused=absent) == "unmeasured"
    assert said(bar, seconds | {"tokamax": 1.0}) == "met"
    for peer in ("cudnn", "tokamax", "jax.nn", "torch"):  # the best of them counts
        assert said(bar, seconds | {"tokamax": 1.1} | {peer: 0.9}) == "missed"


def test_values_are_what_the_bar_says():
    value = lambda start, *args: bar_of(start).value(page_of(bar_of(start), *args)["cases"][0])
    assert value("our kernel, forward", {"pallas": 2.0, "cudnn": 1.0}) == 0.5
    assert value("our kernel, backward with heads", {}, {"pallas": 3e14}) == 300.0
    assert value("our kernel, rate", {}, {"pallas": 3.0, "pallas, unmasked": 4.0}) == 0.75
    assert value("a sixteenth", {"mask": 2.0, "xla": 3.0, "dense cudnn": 30.0}) == 15.0
    assert value("bytes of the cache", {}, {"xla": 1.0, "pallas": 3.0, "copy": 4.0}) == 0.75
    assert value("bytes of the cache", {}, {"copy": 4.0}) is None


def test_the_command_reads_the_newest_page(tmp_path, capsys):
    bar = bar_of("our kernel, forward")
    (tmp_path / "other.json").write_text("{}")
    for name, date, seconds in (("a", "2026-01-02", 3.0), ("b", "2026-01-01", 1.0)):
        page = page_of(bar, {"pallas": seconds, "cudnn": 1.0}) | {"date": date}
        (tmp_path / f"{name}.json").write_text(json.dumps(page))
    assert benchmark.main(["bars", "--folder", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "attnjax benchmark attention" in lines and "attnjax benchmark decode" in lines
    assert sum("missed" in line and "0.333" in line for line in lines) == 1
    assert sum("unmeasured" in line for line in lines) == len(BARS) - 1
    (tmp_path / "a.json").unlink()
    assert benchmark.main(["bars", "--folder", str(tmp_path)]) == 0
    assert sum(" met " in line for line in capsys.readouterr().out.splitlines()) == 1
