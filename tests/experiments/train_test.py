"""Whole runs: what they leave, how they stop, and that they resume to the bit."""

import json
import pathlib
import signal
import time

import numpy as np
import pytest

from experiments import config as configs
from experiments import train
from tests.experiments import runs


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert train.train(runs.tiny(path)) == 0
    return path


def test_a_run_leaves_what_it_promises(uninterrupted):
    files = {p.relative_to(uninterrupted).as_posix() for p in uninterrupted.rglob("*")}
    assert {"config.json", "env.txt", "metrics.jsonl", "plots/curves.png"} <= files
    assert any(name.startswith("tensorboard/events") for name in files)
    content = json.loads((uninterrupted / "config.json").read_text())
    assert content["config"]["task"] == runs.tiny("x").task and content["model"]["kind"] == "lm"
    steps = [line["step"] for line in runs.metrics(uninterrupted)]
    assert steps == sorted(steps) and steps[-1] == runs.STEPS


def test_a_finished_run_does_nothing_more(uninterrupted, capsys):
    before = runs.parameters(uninterrupted)
    assert train.train(runs.tiny(uninterrupted)) == 0
    assert f"resumed after step {runs.STEPS}" in capsys.readouterr().out
    assert before == runs.parameters(uninterrupted)


def test_a_run_ends_at_its_target_and_stays_there(tmp_path):
    config = runs.tiny(tmp_path, target=0.0)
    for _ in range(2):
        assert train.train(config) == 0
        assert runs.metrics(tmp_path)[-1]["step"] == config.eval_every < config.steps
        assert int(runs.parameters(tmp_path)[0]) == config.eval_every


def test_lines_before_the_first_checkpoint_are_written_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    assert train.train(runs.tiny(tmp_path, eval_every=1, target=0.0)) == 0  # one step
    assert [line["step"] for line in runs.metrics(tmp_path)] == [1, 1]  # training, test


def wait_for_step(process, step):
    for line in process.output:
        if line.startswith("done ") and int(line.split()[1]) >= step:
            return
    raise AssertionError("the run ended early")


def test_a_run_that_is_killed_and_then_told_to_stop_resumes_to_the_bit(
    uninterrupted, start, tmp_path, capsys
):
    path = tmp_path / "killed"
    process = start(runs.loud, path)
    wait_for_step(process, 9)
    time.sleep(0.02)  # somewhere in a step, a save or a deletion
    assert process.stop(signal.SIGKILL)[0] == -signal.SIGKILL
    process = start(runs.loud, path)
    wait_for_step(process, 17)
    status, said = process.stop(signal.SIGTERM)
    assert status == 0 and "SIGTERM: stopped after step" in said
    assert train.train(runs.tiny(path)) == 0
    assert "resumed after step" in capsys.readouterr().out
    assert runs.parameters(path) == runs.parameters(uninterrupted)
    keep = lambda line: {k: v for k, v in line.items() if k not in ("time", "tokens_per_second")}
    expected = [keep(line) for line in runs.metrics(uninterrupted)]
    assert [keep(line) for line in runs.metrics(path)] == expected


def test_another_run_is_not_resumed(uninterrupted, capsys):
    other = runs.tiny(uninterrupted, seed=1)
    with pytest.raises(ValueError, match="config.seed was 0 and is 1"):
        train.train(other)


def test_a_batch_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    import grain

    class Poison(grain.transforms.Map):
        def __repr__(self):
            return "Poison()"

        def map(self, element):
            Poison.seen = getattr(Poison, "seen", 0) + 1
            bad = np.float32("nan") if Poison.seen > 40 else np.float32(1)
            return element | {"weights": element["weights"] * bad}

    monkeypatch.setattr(configs, "make_augmentations", lambda texts: [Poison()])
    config = runs.tiny(tmp_path / "nan")
    with pytest.raises(train.NotFinite, match=r"step \d+: loss nan .* batch [0-9a-f]{64}; last"):
        train.train(config)
    saved = [int(p.name) for p in pathlib.Path(config.directory, "checkpoints").glob("[0-9]*")]
    assert saved and max(saved) * config.batch_size <= 40 + 3 * config.batch_size


def test_a_dry_run_compiles_and_writes_nothing(tmp_path, capsys):
    assert train.train(runs.tiny(tmp_path / "dry", dry_run=True)) == 0
    out = capsys.readouterr().out
    for word in ("batch inputs", "block_0/mixer/query", "mesh data 4", "gradients"):
        assert word in out
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["digitz"], "did you mean digits"),
        (["digits", "--mixers", "multi_hed_attention"], "did you mean multi_head_attention"),
        (["digits", "--mixers", "gqa(num_kv_head=2)"], "did you mean num_kv_heads"),
        (["digits", "--task", "digit"], "did you mean digits"),
        (["digits", "--model", "vit(featurs=8)"], "did you mean features"),
        (["digits", "--augment", "Affin()"], "did you mean Affine"),
        (["mqar", "--mixers", "cbam"], "cbam"),
        (["digits", "--batch-size", "63"], "must be a multiple of 4"),
    ],
)
def test_wrong_input_is_one_clear_line(args, message, capsys, tmp_path):
    extra = [] if args[0] == "digitz" else ["--directory", str(tmp_path / "no")]
    assert train.main([*args, *extra]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "no").exists()
