"""Results that are worked out once: a file each, and what is there already is read back."""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from attnjax.core import registry
from experiments import config as configs
from experiments import run_directory, step_cost, train


class Stopped(Exception):
    """A signal ended a training before its last step."""


def remembered(file: pathlib.Path, make: Callable[[], Any]) -> Any:
    """What `make` gave, as JSON, when it was first called for `file`."""
    if not file.exists():
        content = json.dumps(make(), indent=1)
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".new")  # so that a file is whole or not there
        new.write_text(content)
        new.replace(file)
    return json.loads(file.read_text())


def name(config: configs.Experiment) -> str:
    """A file name of one mechanism, the seed, and all else that decides a run's numbers."""
    sha = hashlib.sha256(json.dumps(configs.fingerprint(config), sort_keys=True).encode())
    words = "_".join(re.findall(r"\w+", config.mixers[0]))
    return f"{words}-seed{config.seed}-{sha.hexdigest()[:12]}"


def trained(config: configs.Experiment, root: pathlib.Path) -> dict[str, Any]:
    """How training went, in a run directory of its own in `root`; trains what isn't there.

    Accuracy and bits are those of the last evaluation, None where the loss was not finite;
    `updates` says after how many an evaluation first reached the target. Raises Stopped after a
    signal; the next call resumes.
    """
    run = root / name(config)
    config = dataclasses.replace(config, directory=str(run))
    return remembered(run / "cell.json", lambda: _train(config))


def measured(config: configs.Experiment, root: pathlib.Path, *, runs: int) -> dict[str, Any]:
    """Seconds and memory of a training step, or `failure`: why there is none at this length."""

    def measure():
        length = registry.parse_call(config.task)[1]["length"]
        try:
            return {"length": length, **step_cost.measure(config, runs=runs)}
        except (ValueError, NotImplementedError) as error:
            return {"length": length, "failure": str(error)}

    return remembered(root / f"{name(config)}.json", measure)


def _train(config) -> dict[str, Any]:
    failure = None
    try:
        train.train(config)
    except train.NotFinite as error:
        failure = str(error)
    curve = _curve(pathlib.Path(config.directory))
    reached = [x["step"] for x in curve if x["accuracy"] >= config.target]
    if not failure and not reached and (not curve or curve[-1]["step"] < config.steps):
        raise Stopped
    last = {} if failure else curve[-1]
    return {
        "seed": config.seed,
        "accuracy": last.get("accuracy"),
        "bits": last.get("bits"),
        "updates": reached[0] if reached else None,
        "failure": failure,
        "curve": curve,
        "code": configs.code_version(),
    }


def _curve(run: pathlib.Path) -> list[dict[str, float]]:
    lines = run_directory.metrics(run) if (run / "metrics.jsonl").exists() else []
    names = {"step": "step", "accuracy": "test_accuracy", "bits": "test_bits_per_token"}
    return [{k: line[v] for k, v in names.items()} for line in lines if "test_accuracy" in line]
