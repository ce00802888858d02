"""What a run leaves behind, line by line."""

import jax
import pytest

from experiments import run_directory
from tests.experiments import runs


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    run = run_directory.RunDirectory(tmp_path / "run", runs.tiny("x"), model={"kind": "lm"})
    for step in (1, 2, 3):
        run.log(step, loss=1.0 / step)
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_text(file.read_text()[:-10])
    assert [line["step"] for line in run_directory.metrics(tmp_path / "run")] == [1, 2]
    run.forget_after(1)
    run.log(2, loss=0.5)
    assert [line["step"] for line in run_directory.metrics(tmp_path / "run")] == [1, 2]
    run.close()
    assert (tmp_path / "run" / "plots" / "curves.png").exists()


def test_the_environment_names_devices_and_versions():
    text = run_directory.environment()
    assert "4 x cpu" in text and "\njax " in text and "\npython 3." in text


def test_a_directory_that_a_process_does_not_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)  # process 0 wrote elsewhere
    with pytest.raises(ValueError, match="run' must be one that all processes share"):
        run_directory.RunDirectory(tmp_path / "run", runs.tiny("x"), model={})
