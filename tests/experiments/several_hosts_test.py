"""Runs of real processes that meet over jax.distributed: one run, whatever becomes of them."""

import dataclasses
import os
import pathlib
import re
import socket
import subprocess
import sys

import chex
import numpy as np
import pytest

from experiments import config as configs
from experiments import evaluation, finished, processes, train
from tests.experiments import runs, several_hosts_run

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
}
LONG = 150  # seconds, for machines that are busy: a process that hangs would take more


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run that one process makes."""
    path = tmp_path_factory.mktemp("runs") / "alone"
    assert train.train(runs.tiny(path)) == 0
    return path


@pytest.fixture
def start_all(start):
    """Starts the processes of a run; returns them."""

    def start_all(path, *, count, mesh, dies, after, **environment):
        address = f"127.0.0.1:{free_port()}"
        started = []
        for index in range(count):
            fields = dict(path=str(path), mesh=mesh, cpu_devices=4 // count)
            if environment:
                fields |= dict(coordinator="auto")
            else:
                fields |= dict(coordinator=address, num_processes=count, process_id=index)
            own = {name: value.format(index) for name, value in environment.items()}
            last = after if index == dies else 0
            started.append(start(several_hosts_run.run, fields, last, own))
        return started

    return start_all


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def assert_same(path, expected):
    """One line for each step, with the same numbers to 1e-5, and the same parameters at the end."""
    number = lambda line: {k: v for k, v in line.items() if k not in ("time", "tokens_per_second")}
    lines, wanted = ([number(line) for line in runs.metrics(p)] for p in (path, expected))
    assert [line.keys() for line in lines] == [line.keys() for line in wanted]
    chex.assert_trees_all_close(lines, wanted, rtol=1e-5, atol=1e-5)
    trees = (finished.load(p).params for p in (path, expected))
    chex.assert_trees_all_close(*trees, rtol=1e-5, atol=1e-5)


def assert_the_others_end(processes_, dies, path):
    """Those that weren't killed end by themselves, and say who was lost and what to do."""
    for index, process in enumerate(processes_):
        status, text = process.end(timeout=LONG)
        if index == dies:
            assert status == -9
            continue
        assert status == processes.LOST, text
        line = next(line for line in text.splitlines() if line.startswith("attnjax train"))
        assert f"process {dies} was lost" in line and f"process {index} of" in line
        saved = re.search(r"the same command goes on after step (\d+)", line)[1]
        assert (path / "checkpoints" / f"{int(saved):09d}").exists()


def test_two_processes_of_a_list_of_hosts_do_what_one_does(alone, tmp_path):
    fields = dataclasses.asdict(runs.tiny(tmp_path / "two", cpu_devices=2))
    default = dataclasses.asdict(configs.named("mqar"))
    options = ["--mesh.data", "4"]
    for name, value in fields.items():
        if name != "mesh" and value != default[name]:
            texts = value if isinstance(value, tuple) else [value]
            options += ["--" + name.replace("_", "-"), *map(str, texts)]
    command = [ROOT / "launch" / "hosts.sh", "localhost localhost", "mqar", *options]
    environment = ENVIRONMENT | {"PORT": str(free_port()), "PYTHON": sys.executable}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONG)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("run directory:") == 1  # one process speaks
    assert_same(tmp_path / "two", alone)


def test_a_run_that_loses_processes_goes_on_to_the_same_curve(alone, start_all, tmp_path):
    """A worker of two dies, then of four on another mesh the one where they meet; one ends it."""
    assert processes.HEARTBEAT_SECONDS + 5 <= 15
    path = tmp_path / "lost"
    slurm = dict(  # as Slurm would tell them, but for a port that is surely free
        JAX_COORDINATOR_PORT=str(free_port()),
        SLURM_JOB_ID="1",
        SLURM_STEP_NODELIST="localhost",
        SLURM_NTASKS="2",
        SLURM_PROCID="{}",
        SLURM_LOCALID="{}",
    )
    first = start_all(path, count=2, mesh=dict(data=4), dies=1, after=7, **slurm)
    assert_the_others_end(first, 1, path)
    second = start_all(path, count=4, mesh=dict(data=1, fsdp=2, context=2), dies=0, after=15)
    assert_the_others_end(second, 0, path)
    assert train.train(runs.tiny(path)) == 0
    assert_same(path, alone)


def test_an_evaluation_counts_every_example_once_over_all_processes():
    _, source = configs.make_task(runs.tiny("x").task, "test")
    whole = evaluation.padded_batches(source, 4, 10)
    parts = [evaluation.padded_batches(source, 4, 10, rows=rows) for rows in ((0, 1), (2, 3))]
    for batch, *halves in zip(whole, *parts, strict=True):
        for name, x in batch.items():
            np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-processes", "2"], "need coordinator=host:port, or auto"),
        (["--coordinator", "auto", "--process-id", "1"], "auto finds both"),
        (["--coordinator", "here"], "must be host:port of process 0, or auto"),
        (["--coordinator", "here:1", "--num-processes", "2", "--process-id", "2"],
         "process_id=2 must be at least 0 and less than num_processes=2"),
    ],
)  # fmt: skip
def test_what_names_no_process_of_a_run_is_one_clear_line(options, message, capsys, tmp_path):
    assert train.main(["digits", "--directory", str(tmp_path / "no"), *options]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_a_port_that_is_taken_is_one_clear_line(capsys, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        options = ["--coordinator", f"localhost:{taken.getsockname()[1]}", "--num-processes", "2"]
        assert train.main(["digits", "--directory", str(tmp_path / "no"), *options]) == 2
    err = capsys.readouterr().err
    assert "is no place to meet: " in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["hosts.sh", "slurm.sbatch", "xpk.sh"])
@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_launch_files_help_on_wrong_use(name, arguments):
    command = ["bash", ROOT / "launch" / name, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
    assert ended.returncode == 2 and ended.stderr.startswith("usage: ")
