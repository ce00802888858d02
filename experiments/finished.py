"""A finished run read back: its config, its model, its parameters, what it measures, a zoo card."""

import datetime
import functools
import json
import os
import pathlib
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

import jax

from attnjax import models, zoo
from attnjax.core import registry
from experiments import checkpointing, evaluation, learning, run_directory
from experiments import config as configs


class Finished(NamedTuple):
    """A run with the parameters of its newest valid checkpoint."""

    config: configs.Experiment
    description: dict  # of the model, for attnjax.models.create
    params: dict
    data_hash: str


def load(path: os.PathLike | str) -> Finished:
    """The run in `path`; ValueError where it holds none."""
    file = pathlib.Path(path) / "config.json"
    if not file.exists():
        raise ValueError(f"{path} holds no run: there is no config.json")
    content = json.loads(file.read_text())
    fields = content["config"] | {"mesh": configs.Mesh(**content["config"]["mesh"])}
    as_tuple = lambda value: tuple(value) if isinstance(value, list) else value
    config = configs.Experiment(**{name: as_tuple(value) for name, value in fields.items()})
    _, source = configs.make_task(config.task, "train")
    model = models.create(content["model"]["kind"], **content["model"]["options"])
    example = next(evaluation.padded_batches(source, 1))
    init = lambda: learning.init_state(model, learning.optimizer(config), example, config.seed)
    with checkpointing.Checkpointer(
        pathlib.Path(path) / "checkpoints",
        fingerprint={},
        read_only=True,
        allow_changes=("config", "data", "code", "jax"),
    ) as checkpointer:
        restored = checkpointer.restore_latest_valid(jax.eval_shape(init))
    if restored is None:
        raise ValueError(f"{path} holds no checkpoint")
    params = jax.device_get(restored.state["params"])
    return Finished(config, content["model"], params, source.fingerprint())


def measure(task: str, module, params, *, batch_size: int = 64) -> dict[str, float]:
    """Metrics of a module on the whole test split of a task."""
    record, source = configs.make_task(task, "test")
    totals: dict[str, float] = {}
    for batch in evaluation.padded_batches(source, batch_size):
        sums = _sums(module, params, batch)
        totals = {name: totals.get(name, 0.0) + float(x) for name, x in sums.items()}
    return evaluation.metrics(totals, record.kind)


@functools.partial(jax.jit, static_argnums=0)
def _sums(module, params, batch):
    return learning.loss_sums(module, params, batch, jax.random.key(0))[1]


def publish(
    name: str,
    runs: Sequence[os.PathLike | str],
    *,
    root: os.PathLike | str,
    command: str,
    reference: dict | None = None,
) -> zoo.Card:
    """Saves the first of `runs`, the same run with different seeds, to the zoo in `root`.

    Every run is measured on the whole test split; the card tells all of them. `command` is what
    trains it again.
    """
    finished = [load(path) for path in runs]
    first = finished[0]
    module = models.create(first.description["kind"], **first.description["options"])
    measured = [measure(run.config.task, module, run.params) for run in finished]
    task, options = registry.parse(first.config.task)
    card = zoo.Card(
        name=name,
        task={"name": task, "options": options},
        model=first.description,
        mechanisms=tuple(sorted({registry.parse(text)[0] for text in first.config.mixers})),
        config=json.loads(json.dumps(configs.fingerprint(first.config))),
        commit=_commit(),
        seed=first.config.seed,
        command=command,
        data_hash=first.data_hash,
        metrics={key: zoo.summary([m[key] for m in measured]) for key in measured[0]},
        reference=reference,
        licence="Apache-2.0",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    zoo.save(name, first.params, card, root=root)
    return next(kept for kept in zoo.list(root=root) if kept.name == name)


def task_text(card: zoo.Card) -> str:
    """The task of a card as a config says it."""
    return configs.text(card.task["name"], card.task["options"])


def curves(path: os.PathLike | str) -> list[dict]:
    """The metrics of a run, a dict for each logged step."""
    return run_directory.metrics(path)


def _commit() -> str:
    git = ["git", "-C", str(configs.ROOT), "rev-parse", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or f"no commit; code {configs.code_version()}"
