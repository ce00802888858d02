"""PyTorch's side of a benchmark: another process, so that no threads and no memory pools meet."""

import contextlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from experiments import config as configs
from experiments.measuring import turns

_FIELDS = "batch", "length", "heads", "kv_heads", "head_dim", "value_dim", "mask", "way", "dtype"


class Torch:
    """An interpreter that runs experiments/measuring/torch_timing.py, or none."""

    def __init__(self, process: subprocess.Popen | None = None, version: str | None = None):
        self.process, self.version = process, version

    def prepare(self, operation: str, case) -> turns.Timer:
        """A timer of an operation of torch_timing.py; raises Refused without an interpreter."""
        if self.process is None:
            raise turns.Refused("ModuleNotFoundError: torch; --torch-python names one")
        wanted = {name: getattr(case, name) for name in _FIELDS}
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        request = dict(operation=operation, device=device, **wanted)
        return lambda calls: self._seconds(request | {"calls": calls})

    def _seconds(self, request):
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"refused": "the interpreter of torch has ended"}
        if "refused" in answer:
            raise turns.Refused(answer["refused"])
        return answer["seconds"]


@contextlib.contextmanager
def opened(python: Path | None) -> Iterator[Torch]:
    """The interpreter that is named, this one where it has torch, or none.

    Raises FileNotFoundError where the named one has no torch.
    """
    if python is None and importlib.util.find_spec("torch"):
        python = Path(sys.executable)
    if python is None:
        yield Torch()
        return
    program = [python, configs.ROOT / "experiments/measuring/torch_timing.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(program, **pipes) as process:
        version = process.stdout.readline().strip()
        if not version:
            raise FileNotFoundError(f"torch_python={str(python)!r} must be a Python with torch")
        yield Torch(process, version)
