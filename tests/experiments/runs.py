"""A tiny run, for tests that start, stop and compare runs."""

import dataclasses
import json
import pathlib

from experiments import config as configs
from experiments import run_directory

STEPS = 24


def tiny(path, **changes):
    """A run of a few seconds, with frequent saves, deletions and lines of progress."""
    config = configs.Experiment(
        task="mqar(vocab_size=16, length=8, num_pairs=2)",
        model="lm(features=8, depth=1, num_heads=2)",
        mixers=("multi_head_attention(rotary_base=10000.0)",),
        directory=str(path),
        steps=STEPS,
        batch_size=8,
        log_every=1,
        eval_every=8,
        eval_examples=16,
        save_every=2,
        keep=2,
        mesh=configs.Mesh(data=4),
    )
    return dataclasses.replace(config, **changes)


def loud(path) -> int:
    """The tiny run, for a process of its own, with a line for each step."""
    from experiments import progress, train

    advance = progress.Progress.advance

    def advance_and_say(self, metrics):
        advance(self, metrics)
        print(f"done {self._done}", flush=True)

    progress.Progress.advance = advance_and_say
    return train.train(tiny(path, cpu_devices=4))


def metrics(path):
    """The lines of a run's metrics."""
    return run_directory.metrics(path)


def parameters(path):
    """What the newest checkpoint of a run holds: its step, and the digest of each leaf."""
    newest = max((pathlib.Path(path) / "checkpoints").glob("[0-9]*"))
    manifest = json.loads((newest / "manifest" / "metadata").read_text())
    return newest.name, manifest["body"]["leaves"]
