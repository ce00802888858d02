"""Real signals to real processes, and the flag in this one."""

import os
import pathlib
import re
import signal
import socket

import jax
import pytest

from experiments import checkpointing, preemption
from tests.experiments import forked, preempted_run


def _until_running(process: forked.Process) -> None:
    assert "running\n" in iter(process.output.readline, "")


def _stopped_at(process: forked.Process, reason: str) -> int:
    status, output = process.end(timeout=100)
    assert status == 0, output
    return int(re.search(rf"{reason}: stopped after step (\d+);", output)[1])


def _assert_saved(directory: pathlib.Path, step: int) -> None:
    target = {"w": jax.ShapeDtypeStruct((8, 3), "float32")}
    with checkpointing.Checkpointer(directory, fingerprint={}, read_only=True) as reader:
        restored = reader.restore_latest_valid(target)
    assert (restored.step, restored.data_state) == (step, {"next": step})
    assert (restored.state["w"] == step).all()


def test_one_process_saves_the_step_it_stops_at_and_resumes_there(start, tmp_path):
    steps = [0]
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(preempted_run.run, str(tmp_path))
        _until_running(process)
        process.send_signal(number)
        steps.append(_stopped_at(process, number.name))
        assert steps[-1] > steps[-2]
        _assert_saved(tmp_path, steps[-1])


def test_two_processes_stop_at_the_same_step_when_one_is_told(start, tmp_path):
    last = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        cluster = preempted_run.run, str(tmp_path), address
        processes = [start(*cluster, index) for index in range(2)]
        for process in processes:
            _until_running(process)
        processes[1].send_signal(number)
        first, second = [_stopped_at(process, "preemption notice") for process in processes]
        assert first == second > last
        _assert_saved(tmp_path, first)
        last = first


def test_nothing_is_requested_without_a_signal_and_it_stays_requested_after_one():
    with preemption.Preemption() as preempted:
        assert not preempted.requested(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preempted.requested(2) and preempted.requested(3)
        assert preempted.message(3).startswith("SIGTERM: stopped after step 3;")


def test_the_second_interrupt_is_immediate():
    with pytest.raises(KeyboardInterrupt), preemption.Preemption() as preempted:
        os.kill(os.getpid(), signal.SIGINT)
        assert preempted.requested(1)
        os.kill(os.getpid(), signal.SIGINT)


def test_the_former_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with preemption.Preemption():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
