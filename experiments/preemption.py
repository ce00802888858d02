"""Stopping a run in order: a signal asks, the loop saves at the next step and exits with 0.

with Preemption() as preemption:
    for step in ...:
        ...
        if preemption.requested(step):
            checkpointer.save(step, state, data_state)
            checkpointer.close()
            print(preemption.message(step))
            return 0
"""

import os
import signal

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Turns SIGTERM, and the first SIGINT, into an answer of `requested`.

    In a run without jax.distributed the signals are caught here; without that, SIGTERM would end
    the process with nothing saved. In a distributed run jax itself catches SIGTERM on any process
    and lets all of them agree on one later step, so SIGINT is passed on as SIGTERM. A second SIGINT
    interrupts at once. Enter it in the main thread, after jax.distributed.initialize.
    """

    def __init__(self):
        self._reason: str | None = None
        self._previous = {}
        self._distributed = False

    def __enter__(self) -> "Preemption":
        self._distributed = jax.distributed.is_initialized()
        caught = (signal.SIGINT,) if self._distributed else (signal.SIGINT, signal.SIGTERM)
        self._previous = {number: signal.signal(number, self._notice) for number in caught}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether to save at `step` and stop: the same answer on every process.

        Call it once for every step, on every process; once True it stays True. Raises RuntimeError
        in a distributed run whose `jax_enable_preemption_service` is off.
        """
        if self._distributed and multihost_utils.reached_preemption_sync_point(step):
            self._reason = "preemption notice"
        return self._reason is not None

    def message(self, step: int) -> str:
        """The line to print before the exit."""
        return f"{self._reason}: stopped after step {step}; the same command resumes there"

    def _notice(self, number: int, _) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._distributed:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._reason = signal.Signals(number).name
