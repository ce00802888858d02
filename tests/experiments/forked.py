"""Processes forked from one that has imported what a run needs: a new one would take seconds.

That one is started with the first of them and computes nothing, for a backend survives no fork.
"""

import multiprocessing
import os
import sys

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        *("matplotlib.figure", "matplotlib.backends.backend_agg", "tensorboardX"),
        *("attnjax.models.lm", "attnjax.softmax.multi_head_attention", "attnjax.parallel.ring"),
        *("attnjax.tasks.mqar", "attnjax.tasks.loading"),
        *("experiments.dry_run", "experiments.checkpointing", "experiments.placement"),
        *("experiments.progress", "experiments.run_directory", "experiments.train"),
        *("experiments.preemption", "experiments.processes"),
    ]
)


class Process:
    """function(*args), whose result is the exit status, in a process of its own.

    `output` is a text file of what it writes to stdout and stderr.
    """

    def __init__(self, function, *args):
        reader, writer = _SERVER.Pipe(duplex=False)
        with reader, writer:
            self.output = os.fdopen(os.dup(reader.fileno()))
            self._process = _SERVER.Process(target=_run, args=(writer, function, args), daemon=True)
            self._process.start()

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def end(self, timeout: float) -> tuple[int, str]:
        """(its exit status, or less than 0 the signal that killed it; the rest of its output)."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"a process still runs after {timeout} seconds")
        return self._process.exitcode, self.output.read()

    def close(self) -> None:
        """Kills it where it still runs."""
        self._process.kill()
        self._process.join()
        self.output.close()

    def stop(self, number: int) -> tuple[int, str]:
        """As `end`, after a signal."""
        self.send_signal(number)
        return self.end(timeout=100)


def _run(writer, function, args) -> None:
    from tests import settings

    for stream in (1, 2):
        os.dup2(writer.fileno(), stream)
    writer.close()
    settings.settle()
    settings.collect_less_garbage()
    sys.exit(function(*args))
