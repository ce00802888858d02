import json
import sys

import pytest

from experiments import benchmark

TINY = ["--lengths", "8", "16", "--head-dims", "4", "--heads", "2", "--runs", "2", "--seconds", "0"]


def run(tmp_path, *argv):
    out = tmp_path / "numbers.json"
    code = benchmark.main(["attention", *TINY, "--out", str(out), *argv])
    return code, json.loads(out.read_text()) if out.exists() else None


def test_numbers_say_what_they_are_of(tmp_path, capsys):
    code, page = run(tmp_path, "--largest-dense", "8")
    assert code == 0 and (tmp_path / "numbers.png").stat().st_size > 0
    assert {"cpu", "cores", "platform"} <= set(page["machine"]) and page["versions"]["jax"]
    assert page["config"]["heads"] == 2 and page["config"]["dtype"] == "float32"
    cases = {(x["length"], x["causal"], x["backward"]): x for x in page["cases"]}
    assert len(cases) == len(page["cases"]) == 2 * 2 * 2
    for (length, _, _), case in cases.items():
        medians, ratios = case["median_seconds"], case["times_ours"]
        assert set(medians) == {"blocked", "dense", "jax.nn"} if length == 8 else {"blocked"}
        assert ratios == {name: x / medians["blocked"] for name, x in medians.items()}
        assert case["runs"] == 2 and min(medians.values()) > 0
    assert "T 16, D 4, causal, forward+backward" in capsys.readouterr().out


def test_torch_is_timed_by_another_interpreter(tmp_path, monkeypatch):
    stub = tmp_path / "python"  # answers as experiments/torch_timing.py does
    stub.write_text(f'#!{sys.executable}\nimport sys\nprint("9.9", flush=True)\n'
                    "for line in sys.stdin: print(len(line), flush=True)\n")  # fmt: skip
    stub.chmod(0o755)
    _, page = run(tmp_path, "--torch-python", str(stub))
    assert page["versions"]["torch"] == "9.9"
    for case in page["cases"]:
        request = [case[name] for name in ("length", "head_dim")] + [2]
        request += [case["causal"], case["backward"], benchmark.os.cpu_count()]
        assert case["median_seconds"]["torch"] == len(json.dumps(request)) + 1


@pytest.mark.parametrize("python", ["absent", "without torch"])
def test_an_interpreter_without_torch_is_named(tmp_path, capsys, python):
    path = tmp_path / "python"
    if python == "without torch":
        path.write_text("#!/bin/sh\nexit 1\n")
        path.chmod(0o755)
    assert run(tmp_path, "--torch-python", str(path)) == (2, None)
    assert str(path) in capsys.readouterr().err


def test_runs_take_turns():
    order = []
    timers = {name: lambda name=name: order.append(name) or 1.0 for name in (benchmark.OURS, "b")}
    times = benchmark.take_turns(timers, runs=3, seconds=0.0)
    assert times == {benchmark.OURS: [1.0] * 3, "b": [1.0] * 3}
    assert order == [benchmark.OURS, "b"] * 4  # the first round is not counted
