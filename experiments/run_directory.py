"""What a run leaves behind: config.json, env.txt, metrics.jsonl, TensorBoard events, plots."""

import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys
import time

import jax
from jax.experimental import multihost_utils


class RunDirectory:
    """The folder of one run. Only process 0 writes, all must see it; a resumed run appends.

    Raises ValueError where this process doesn't see what process 0 wrote.
    """

    def __init__(self, path: os.PathLike | str, config, *, model: dict):
        self.path = pathlib.Path(path)
        self.writes = jax.process_index() == 0
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            content = {"config": dataclasses.asdict(config), "model": model}
            (self.path / "config.json").write_text(json.dumps(content, indent=2) + "\n")
            (self.path / "env.txt").write_text(environment())
        multihost_utils.sync_global_devices("process 0 wrote the config")
        if not (self.path / "config.json").exists():
            raise ValueError(f"directory={str(path)!r} must be one that all processes share")
        self._events = None
        self._best = -math.inf

    def forget_after(self, step: int) -> None:
        """Drop lines of steps after `step`: a run that resumes there will write them again."""
        file = self.path / "metrics.jsonl"
        written = metrics(self.path) if file.exists() else []
        kept = [line for line in written if line["step"] <= step]
        tested = [line["test_accuracy"] for line in kept if "test_accuracy" in line]
        self._best = max(tested, default=-math.inf)
        multihost_utils.sync_global_devices("all processes read the metrics")
        if self.writes and file.exists():
            # whole at any moment, as someone may be looking on
            new = file.with_suffix(".new")
            new.write_text("".join(json.dumps(line) + "\n" for line in kept))
            new.replace(file)

    def reached(self, target: float | None) -> bool:
        """Whether a test accuracy of the run is `target` or more."""
        return target is not None and self._best >= target

    def log(self, step: int, **values: float) -> None:
        """One line of metrics.jsonl, and the same as TensorBoard scalars."""
        self._best = max(self._best, values.get("test_accuracy", self._best))
        if not self.writes:
            return
        line = {"step": step, "time": time.time(), **values}
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if self._events is None:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(self.path / "tensorboard"))
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the events and draw the curves."""
        if self._events is not None:
            self._events.close()
        if self.writes and (self.path / "metrics.jsonl").exists():
            plot(self.path)


def metrics(path: os.PathLike | str) -> list[dict]:
    """The lines of metrics.jsonl; a last line that a kill cut short is left out."""
    lines = []
    for text in (pathlib.Path(path) / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def plot(path: os.PathLike | str) -> pathlib.Path:
    """Curves of every metric over steps, training and test side by side: plots/curves.png."""
    from matplotlib.figure import Figure

    lines = metrics(path)
    names = ("loss", "accuracy", "gradient_norm")
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        for key, style in ((name, dict(alpha=0.7)), (f"test_{name}", dict(marker="o", ms=3))):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), label=key.replace("_", " "), **style)
        axes.set(title=name.replace("_", " "), xlabel="step")
        if axes.lines:
            axes.legend(frameon=False)
    file = pathlib.Path(path) / "plots" / "curves.png"
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=120)
    return file


def environment() -> str:
    """Machine, devices and versions, a line each."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    device = jax.devices()[0]
    machine = f"{platform.platform()}, {os.cpu_count()} cores"
    devices = f"{len(jax.devices())} x {device.device_kind} ({device.platform})"
    return "\n".join([machine, devices, f"python {sys.version.split()[0]}", *versions]) + "\n"
