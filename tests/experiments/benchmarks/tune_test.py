"""The table that is measured: what is timed, what it says, and what becomes of rows it had."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from attnjax.ops import tuning
from experiments.benchmarks import tune
from pallas_kernels import tables

CASE = tuning.Case("dot_product_attention", "float32", 8, 16)
ABOUT = {
    "date": "2026-01-02T03:04:05+00:00",
    "machine": {"cpu": "C", "cores": 2, "platform": "L"},
    "device": {"platform": "cpu", "kind": "cpu"},
    "versions": {"jax": "0.12"},
    "load": (1.25, 0, 0),
}
DENSE, SMALL, LARGE = (
    tuning.Candidate(name, tiles)
    for name, tiles in (("dense", ()), ("blocked", (("block", 16),)), ("blocked", (("block", 32),)))
)


def test_a_table_is_measured_and_written(tmp_path, capsys, monkeypatch):
    found = [DENSE, SMALL, LARGE, tuning.Candidate("x")]
    monkeypatch.setitem(tuning.CANDIDATES["dot_product_attention"], "cpu", found)
    out = tmp_path / "cpu.json"
    sizes = dict(operations=("dot_product_attention",), lengths=(16,), head_dims=(8,), heads=1)
    config = tune.Config(**sizes, runs=1, seconds=0.0, out=out)
    assert tune.run(config) == 0
    table, text = tables.read(out), capsys.readouterr().out
    first, second, *kept = table.rows
    assert {first.implementation, second.implementation} == {"dense", "blocked"}
    assert (first.dtype, first.head_dim, first.length) == ("float32", 8, 16)
    assert first.source["how"] == "measured" and first.source["load"] >= 0
    assert first.source["ratio"] >= 1 >= second.source["ratio"]
    assert tuple(kept) == tables.of("cpu").rows  # of other widths
    assert f"{CASE}: no time of x: ValueError" in text and f"wrote {out}" in text
    assert f"{CASE}: {first.implementation}" in text


@pytest.mark.parametrize("operation", ["linear_recurrence", "decay_attention", "selective_scan"])
def test_chunks_of_recurrences_are_candidates(operation):
    case = dataclasses.replace(CASE, operation=operation, length=130)
    found, refused = tune.distinct(case, tuning.arrays(case, 1))
    assert set(found) == set(tuning.candidates(case)) and len(found) == 3 and not refused


NEW = {  # operation -> (length, how many of its candidates differ)
    "block_sparse_attention": (64, 3),
    "decode_attention": (1024, 5),
    "neighborhood_attention": (64, 1),
}


@pytest.mark.parametrize("operation", NEW)
def test_candidates_differ_and_run(operation):
    length, count = NEW[operation]
    case = dataclasses.replace(CASE, operation=operation, length=length)
    arrays = tuning.arrays(case, 4)
    found, refused = tune.distinct(case, arrays)
    assert len(found) == count and not refused
    step = list(found[tuning.Candidate("xla")].values())[-1]
    for x in jax.tree.leaves(jax.jit(step)(*arrays)):  # gradients, but of decoding the output
        assert jnp.isfinite(x).all() and (x != 0).mean() > 0.9


def test_quick_measures_what_has_no_gradient_and_what_has_no_choice(capsys):
    names = "decode_attention", "neighborhood_attention"
    assert tune.run(tune.Config(operations=names, head_dims=(8,), heads=1, quick=True)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([x for x in lines if x.endswith("nothing to choose from")]) == 4


def test_rows_are_from_the_fastest_on_one_of_each_implementation():
    rows = tune.ranked(CASE, {DENSE: 3.0, SMALL: 2.0, LARGE: 1.0}, ABOUT)
    assert [(x.implementation, dict(x.tiles), x.source["ratio"]) for x in rows] == [
        ("blocked", {"block": 32}, 2.0),
        ("dense", {}, 0.333),
    ]
    facts = dict(how="measured", device="C, 2 cores", driver="L", jax="0.12", date="2026-01-02")
    assert rows[0].source == facts | {"load": 1.2, "ratio": 2.0}
    assert tune.ranked(CASE, {DENSE: 3.0}, ABOUT) == [] == tune.ranked(CASE, {}, ABOUT)


def test_an_accelerator_is_named_with_its_driver():
    device = {"platform": "gpu", "kind": "H", "driver_version": "1.2"}
    assert tune.source(ABOUT | {"device": device})["driver"] == "1.2"
    versions = {"versions": {"jax": "0.12", "libtpu": "0.0.1"}}
    tpu = tune.source(ABOUT | {"device": {"platform": "tpu", "kind": "T"}} | versions)
    assert (tpu["device"], tpu["driver"]) == ("T", "0.0.1")


def test_rows_are_renewed(tmp_path):
    old = [tuning.row(CASE, DENSE, {"how": "computed", "rule": "r"})]
    old.append(dataclasses.replace(old[0], length=None))
    old += [dataclasses.replace(old[0], **x) for x in ({"head_dim": 64}, {"dtype": None})]
    new = tune.ranked(CASE, {DENSE: 3.0, SMALL: 2.0}, ABOUT)
    with tables.using(tables.Table("cpu", "cpu", tuple(old))):
        assert tune.changed(CASE, new) == (
            "blocked block=16, 1.50 times as fast as the next (before: dense)"
        )
        path = tuning.write(new, tmp_path / "t.json")
    assert tables.read(path).rows == (*new, *old[2:])
    with tables.using(tables.read(path)):
        assert "(as before)" in tune.changed(CASE, new)
    with tables.using(tables.Table("cpu")):
        assert "(before: by rule)" in tune.changed(CASE, new)
    assert tune.changed(CASE, []) == "nothing to choose from"


def test_candidates_that_are_the_same_program_are_timed_once(monkeypatch):
    steps = {DENSE: "a", SMALL: "b", LARGE: "b"}
    call = lambda name: {"causal": lambda q, k, v, do: dict(a=q, b=q * k)[name]}
    monkeypatch.setattr(tuning, "candidates", lambda case: list(steps))
    monkeypatch.setattr(tuning, "steps", lambda case, candidate: call(steps[candidate]))
    assert list(tune.distinct(CASE, tuning.arrays(CASE, 1))[0]) == [DENSE, SMALL]


def test_quick_leaves_the_shipped_table_alone(monkeypatch):
    monkeypatch.setattr(tune, "measure", lambda config, about: ([], [str(config.lengths)]))
    monkeypatch.setattr(tuning, "write", None)
    assert tune.run(tune.Config(quick=True)) == 0


def test_wrong_arguments(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="operation 'f' must be one of"):
        tune.Config(operations=("f",))
    with pytest.raises(ValueError, match="must grow"):
        tune.Config(lengths=(4, 2))
    monkeypatch.setattr(tune, "measure", lambda config, about: ([], []))
    (tmp_path / "file").touch()
    assert tune.run(tune.Config(out=tmp_path / "file/t.json")) == 2
    assert "name another file with --out" in capsys.readouterr().err
