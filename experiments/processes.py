"""Several processes as one run: how they meet, and how they end where one of them is lost.

The runtime is jax.distributed: process 0 keeps a coordination service, to which every process
sends heartbeats and which tells the others when one has fallen silent. JAX's own answer to that is
to abort, in a C++ thread. Here a Python thread hears of it too, and ends the process first, with a
line that says who was lost and from where the run goes on.

    with joined(config, told):
        ...
"""

import contextlib
import ctypes
import itertools
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax._src import distributed  # the client of the runtime has no public name

from experiments import checkpoint_step

HEARTBEAT_SECONDS = 10  # of silence after which a process counts as lost; JAX's default is 100
LOST = 75  # exit status where another process was lost: the same command goes on
_AUTO = "auto"
_LONGEST_MS = 2**31 - 1
_TIME_OF_THE_SAME_ERROR = 2  # seconds between the first and the last process that sees it
_STATUS = re.compile(r"[A-Z_]+: ")  # how errors of the runtime begin, whatever their type


def check(config) -> None:
    """ValueError, before anything waits for anyone, where a config names no process of a run."""
    coordinator, count, index = config.coordinator, config.num_processes, config.process_id
    given = f"num_processes={count}, process_id={index}"
    if coordinator in ("", _AUTO):
        if (count, index) != (1, 0):
            why = "auto finds both" if coordinator else "they need coordinator=host:port, or auto"
            raise ValueError(f"{given} don't go with {coordinator=}: {why}")
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{coordinator=} must be host:port of process 0, or auto")
    if not 0 <= index < count:
        raise ValueError(
            f"process_id={index} must be at least 0 and less than num_processes={count}"
        )
    if index == 0:  # jaxlib 0.12.0 now and then crashes where it can't listen
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except (OSError, OverflowError) as error:
                raise ValueError(f"{coordinator=} is no place to meet: {error}") from None


@contextlib.contextmanager
def joined(config, told: Callable[[BaseException, str], int]) -> Iterator[None]:
    """Within it this process is one of the run's; without a coordinator it is alone anyway.

    Of several processes one that leaves it with an exception ends: `told`, given the exception and
    who had it, says so and returns the exit status. To go on would be to wait for the others, who
    wait for this one.
    """
    check(config)
    if not config.coordinator:
        yield
        return
    watch = _Watch(config)
    watch.meet()
    try:
        yield
    except BaseException as error:
        watch.leave(error, told)
    watch.part()


class _Watch:
    """Threads that end this process when another is lost, until all part."""

    def __init__(self, config):
        self._config = config
        self._checkpoints = pathlib.Path(config.directory) / "checkpoints"
        self._client, self._parting = None, False
        if sys.platform == "linux":  # elsewhere JAX's abort has the last word
            _hold_aborts()
            threading.Thread(target=self._wait_for_an_abort, daemon=True).start()

    def meet(self) -> None:
        """Waits for all the others to be there; ValueError where they can't meet."""
        _initialize(self._config)
        state = distributed.global_state
        self._client, self._index, self._count = state.client, state.process_id, state.num_processes
        self._thread = threading.Thread(target=self._wait_for_a_loss, daemon=True)
        self._thread.start()

    def part(self) -> None:
        """Waits for the others to come to their end too."""
        self._parting = True
        jax.distributed.shutdown()
        self._thread.join()

    def leave(self, error: BaseException, told: Callable[[BaseException, str], int]) -> None:
        """Ends this process because of `error`, which may be how a loss shows first."""
        if _is_of_the_runtime(error):
            time.sleep(HEARTBEAT_SECONDS + 3)  # by then a thread has ended the process
        status = told(error, f"process {self._index} of {self._count}: ")
        if self._index == 0:  # whose end the others would take for a loss
            time.sleep(_TIME_OF_THE_SAME_ERROR)
        _end(status)

    def _wait_for_a_loss(self) -> None:
        for number in itertools.count():
            try:
                # a barrier to which nobody else comes: it fails when one of them is lost
                name = f"attnjax {self._index} {number}"
                self._client.wait_at_barrier(name, _LONGEST_MS, list(range(self._count)))
            except jax.errors.JaxRuntimeError as error:
                reason = str(error)
                if self._parting and "heartbeat" not in reason:
                    return
                if not reason.startswith("DEADLINE_EXCEEDED"):
                    lost = re.search(r"Task (\d+)", reason)
                    self._end_without(lost[1] if lost else "0")  # who alone could name itself

    def _wait_for_an_abort(self) -> None:
        # The loss of process 0 may abort this one in the very thread that would tell the other.
        while not _is_aborting():
            time.sleep(0.5)
        if self._client is None:
            where = self._config.coordinator
            _say(f"not all processes met at {where} in time: one is missing, or can't reach it")
            _end(1)
        host, _, port = distributed.global_state.coordinator_address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            self._end_without("0")
        _say(f"process {self._index} of {self._count} is aborted, as said above; {self._advice()}")

    def _end_without(self, lost: str) -> None:
        ended = f"process {self._index} of {self._count} ends"
        _say(f"process {lost} was lost (killed, crashed or cut off), so {ended}; {self._advice()}")
        _end(LOST)

    def _advice(self) -> str:
        step = checkpoint_step.newest(self._checkpoints)
        where = "from the start" if step is None else f"after step {step}"
        return f"the same command goes on {where}, on another number of processes or mesh too"


def _initialize(config) -> None:
    auto = config.coordinator == _AUTO
    given = dict(
        coordinator_address=config.coordinator,
        num_processes=config.num_processes,
        process_id=config.process_id,
        cluster_detection_method="deactivate",  # under Slurm it would leave us one device
    )
    try:
        jax.distributed.initialize(
            **{} if auto else given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except ValueError as error:
        raise ValueError(
            f"coordinator=auto finds Slurm, Open MPI, Kubernetes and Cloud TPU, none of them here "
            f"({error}): give coordinator, num_processes and process_id"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"coordinator={config.coordinator!r} is no place to meet: {reason}"
        ) from error


def _hold_aborts() -> None:
    """Lets a thread that aborts the process sleep first, so that another can speak.

    The handler is C's own sleep, called with the number of the signal: 6 seconds. It needs nothing
    of Python, so a process that can't speak ends all the same.
    """
    libc = ctypes.CDLL(None)
    hold = libc.sysv_signal  # which takes the handler away as it runs
    hold.argtypes, hold.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    hold(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _is_aborting() -> bool:
    status = pathlib.Path("/proc/self/status").read_text()
    caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
    return not caught >> (signal.SIGABRT - 1) & 1


def _is_of_the_runtime(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _say(what: str) -> None:
    os.write(2, f"attnjax train: {what}\n".encode())  # whoever holds sys.stderr


def _end(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)  # a plain exit would wait for the others
