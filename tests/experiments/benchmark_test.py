import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import block_sparse, decode, neighborhood
from experiments.measuring import attention, verdicts
from experiments.measuring import cases as benchmark_cases
from experiments.measuring import run as benchmark_run
from experiments.measuring import turns as benchmark_turns
from experiments.measuring.torch_peer import Torch
from experiments.measuring.turns import Entry

TINY = ["--lengths", "8", "--head-dims", "4", "--heads", "2", "--runs", "2", "--seconds", "0"]
MEASURED = ("attention", "linear", "block_sparse", "neighborhood", "decode")


def run(tmp_path, *argv):
    out = tmp_path / "numbers.json"
    code = benchmark.main(["attention", *TINY, "--out", str(out), *argv])
    return code, json.loads(out.read_text()) if out.exists() else None


def test_numbers_say_what_they_are_of(tmp_path, capsys):
    code, page = run(tmp_path)
    assert code == 0 and (tmp_path / "numbers.png").stat().st_size > 0
    assert {"cpu", "cores", "platform"} <= set(page["machine"]) and page["versions"]["jax"]
    assert page["device"]["kind"] == "cpu" and len(page["load"]) == 3 and page["date"]
    assert page["config"]["heads"] == 2
    assert len({(x["mask"], x["way"]) for x in page["cases"]}) == len(page["cases"]) == 2 * 2
    for case in page["cases"]:
        medians, ratios = case["median_seconds"], case["times_ours"]
        assert set(medians) == {"blocked", "dense", "jax.nn"}
        assert ratios == {name: x / medians["blocked"] for name, x in medians.items()}
        assert case["runs"] == 2 and min(medians.values()) > 0 and case["dtype"] == "float32"
        assert "cuDNN" in case["refused"]["cudnn"] and "torch" in case["refused"]
        without = "tokamax" in case["refused"]["tokamax"]  # or it has no kernel for a CPU
        assert without == (importlib.util.find_spec("tokamax") is None)
    text = capsys.readouterr().out
    assert "T 8, N 2, H 4, causal, forward+backward" in text and "no time of cudnn" in text
    assert "bars unmeasured" in text


def test_whole_matrices_end_at_a_length():
    options = dict(ours=("blocked", "dense"), peers=True, most=23)
    found = attention.entries(case_of(), Torch(), **options)
    for name in ("dense", "jax.nn"):
        with pytest.raises(benchmark_turns.Refused, match="more than 23"):
            found[name].prepare()


def test_torch_is_timed_by_another_interpreter(tmp_path, monkeypatch):
    without = lambda *_: benchmark_turns.refused("not here")
    monkeypatch.setattr(attention, "of_jax", without)
    stub = tmp_path / "python"  # answers as experiments/measuring/torch_timing.py does
    stub.write_text(
        f"#!{sys.executable}\n"
        + """if True:
        import json, sys
        print("9.9", flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            full = {"seconds": request["length"] + request["calls"]}
            answer = {"refused": "no"} if request["mask"] == "causal" else full
            print(json.dumps(answer), flush=True)
    """
    )
    stub.chmod(0o755)
    _, page = run(tmp_path, "--torch-python", str(stub))
    assert page["versions"]["torch"] == "9.9"
    for case in page["cases"]:
        assert case["refused"]["blocked"] == "not here" and not case["times_ours"]
        if case["mask"] == "causal":
            assert case["refused"]["torch"] == "no"
        else:
            assert case["median_seconds"]["torch"] == case["length"] + 1


@pytest.mark.parametrize("python", ["absent", "without torch"])
def test_an_interpreter_without_torch_is_named(tmp_path, capsys, python):
    path = tmp_path / "python"
    if python == "without torch":
        path.write_text("#!/bin/sh\nexit 1\n")
        path.chmod(0o755)
    assert run(tmp_path, "--torch-python", str(path)) == (2, None)
    assert str(path) in capsys.readouterr().err


def test_runs_take_turns_and_what_raises_says_why():
    order = []

    def timer(name, lasts=99):
        def seconds(calls):
            order.append(name)
            if order.count(name) > lasts:
                raise MemoryError("no room\nleft")
            return 0.25 * calls

        return Entry(lambda: seconds, work=1.0)

    entries = {"a": timer("a"), "b": timer("b", lasts=2)}
    entries["c"] = Entry(benchmark_turns.refused("not today"), work=1.0)
    times, why = benchmark_turns.take_turns(entries, runs=3, seconds=0.0)
    assert times == {"a": [0.25] * 3}
    assert why == {"b": "MemoryError: no room left", "c": "not today"}
    assert order == ["a", "b", *"ab", *"ab", "a"]  # the first round is not counted
    times, _ = benchmark_turns.take_turns({"a": timer("a")}, runs=1, seconds=0.0, at_once=1.0)
    assert times == {"a": [1.0]}  # four calls


def test_each_way_is_of_the_function_or_of_its_gradients(monkeypatch):
    monkeypatch.setattr(benchmark_turns, "_seconds", lambda step, args, calls: step(*args))
    x, given = np.arange(3.0, dtype="float32"), np.full(3, 2.0, "float32")
    fn = lambda x, given: given * x**2
    of = lambda way: benchmark_turns.of_jax(fn, (x,), way, (given,))()(1)
    np.testing.assert_allclose(of("forward"), 2 * x**2)
    cotangent = jax.random.normal(jax.random.key(9), (3,))
    for way in ("backward", "forward+backward"):
        [gradient] = of(way)
        np.testing.assert_allclose(gradient, 4 * x * cotangent, rtol=1e-6)


def case_of(cls=benchmark_cases.Case, length=24, heads=4, head_dim=8, **more):
    shape = benchmark_cases.shape(length, heads, head_dim, batch=2, kv_heads=2)
    return cls(**shape | dict(way="forward", dtype="float32") | more)


def close(found, wanted):
    """Within a few roundings of sums of a few products."""
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["jax.nn", "tokamax"])
def test_libraries_are_given_our_masks(monkeypatch, name):
    pytest.importorskip(name)
    monkeypatch.setattr(attention, "WINDOW", 5)
    monkeypatch.setitem(attention.LIBRARIES, "tokamax", ("tokamax", "xla"))  # a CPU has no other
    cases = [case_of(mask=mask) for mask in ("full", "causal", "window", "documents", "padding")]
    cases += [case_of(bias=True), case_of(mask="causal", value_dim=4)]

    def both(case):
        tokens, bias = benchmark_cases.tokens_of(case), benchmark_cases.bias_of(case)
        data = attention.data_of(case)
        seen = attention.same(data) if case.mask == "documents" else data
        attend, library = attention.attend, attention.by_library
        ours = attend(*tokens, data, bias, case=case, implementation="dense")
        return ours, library(*tokens, seen, bias, case=case, name=name)

    with jax.numpy_rank_promotion("allow" if name == "tokamax" else "raise"):
        found = jax.jit(lambda: [both(case) for case in cases])()
    for (ours, theirs), case in zip(found, cases, strict=True):
        close(ours, theirs)
        assert ours.shape == (2, 24, 4, case.value_dim)


def test_work_is_of_visible_tiles():
    case = case_of(length=512, mask="window")
    assert attention.share(case) == 10 / 16  # the window is larger: causal tiles
    forward = benchmark_cases.operations(case, 0.5)
    assert forward == 2 * 2 * 4 * 512**2 * (8 + 8) / 2
    backward = dataclasses.replace(case, way="backward")
    assert benchmark_cases.operations(backward, 0.5) == 2.5 * forward
    documents = dataclasses.replace(case, length=2048, mask="documents")
    assert 0.0 < attention.share(documents) < 0.5


def test_both_forms_of_a_selection_agree():
    case = case_of(block_sparse.Case, kv_heads=4, block=4, chosen=2)
    tokens, chosen = benchmark_cases.tokens_of(case), block_sparse.selection(case)

    @jax.jit
    def both(tokens):
        selected = block_sparse.dense_of(case, chosen)
        by_list = block_sparse.by_list(*tokens, chosen, case=case, implementation="xla")
        return by_list, block_sparse.by_mask(*tokens, selected, case=case, implementation="dense")

    close(*both(tokens))
    assert (block_sparse.dense_of(case, chosen).sum(-1) == 2).all()


def test_both_forms_of_a_neighborhood_agree():
    grid = dict(grid=(4, 6), window=(3, 3), stride=(1, 3))
    case = case_of(neighborhood.Case, kv_heads=4, **grid)
    tokens = benchmark_cases.tokens_of(case)

    @jax.jit
    def both(tokens):
        by_gna = neighborhood.by_gna(*tokens, case=case, implementation="xla")
        by_mask = neighborhood.by_mask(*tokens, case=case, implementation="dense")
        return by_gna.reshape(by_mask.shape), by_mask

    close(*both(tokens))


def test_a_paged_cache_holds_what_libraries_get(monkeypatch):
    monkeypatch.setattr(benchmark_turns, "_seconds", lambda step, args, calls: step(*args))
    case = case_of(decode.Case, page_size=8)
    entries = decode.entries(case, None, peers=True)
    found = {name: entries[name].prepare()(1) for name in ("xla", "jax.nn")}
    close(found["xla"], found["jax.nn"])
    assert entries["xla"].work == 2 * (2 * 24 * 2 * 8) * 4 == entries["copy"].work


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("large", [False, True])
def test_every_case_has_a_row(name, large, monkeypatch, capsys):
    module, pages = benchmark.load(name), []
    monkeypatch.setattr(benchmark_run, "accelerated", lambda: large)
    monkeypatch.setattr(benchmark_cases, "draw", lambda _, shape, dtype: np.zeros(shape, dtype))
    timed = lambda entries: {name: [0.5] for name in entries if name != "pallas"}
    without = lambda entries: {name: "no" for name in entries if name == "pallas"}
    turns = lambda entries, **_: (timed(entries), without(entries))
    monkeypatch.setattr(benchmark_turns, "take_turns", turns)
    monkeypatch.setattr(verdicts, "show_of", pages.append)
    config = module.Config(quick=True)
    assert module.run(config) == 0
    [page] = pages
    assert page["benchmark"] == name and len(page["cases"]) == len(module.cases(config)) > 0
    for row in page["cases"]:
        assert row["rate"].keys() == row["median_seconds"].keys() and min(row["rate"].values()) > 0
        assert any("cudnn" in x for x in row["rate"]) and row["times_ours"]
    text = capsys.readouterr().out
    assert ("no time of pallas (everywhere): no" in text) == large and "wrote" not in text


@pytest.mark.parametrize("name", benchmark.found())
def test_each_benchmark_keeps_the_protocol(name):
    module = benchmark.load(name)
    assert dataclasses.is_dataclass(module.Config) and callable(module.run)
    assert {"attention", "scaling"} <= set(benchmark.found())


def test_help_lists_every_benchmark_without_jax():
    code = "import sys; from experiments import benchmark\n"
    code += "try: benchmark.main(['--help'])\nfinally: print('jax' in sys.modules)"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert text.splitlines()[-1] == "False"
    assert all(name in text for name in benchmark.found())
