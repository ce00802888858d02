"""What a comparison trains: one config for each mechanism, all with the same budget."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from attnjax.core import registry
from experiments import budget, evaluation, placement
from experiments import config as configs

EVALUATIONS = 20  # points of a learning curve, and how finely updates to the target are counted


class Plan(NamedTuple):
    """Configs of seed 0, one a mechanism, and what they share."""

    models: list[configs.Experiment]
    settings: dict[str, Any]


def make(wanted) -> Plan:
    """The plan of an `experiments.compare.Compare`; ValueError for what could not be trained."""
    for name in ("seeds", "runs"):
        if getattr(wanted, name) < 1:
            raise ValueError(f"{name}={getattr(wanted, name)} must be at least 1")
    twice = [text for text in wanted.mechanisms if wanted.mechanisms.count(text) > 1]
    if twice or not wanted.mechanisms:
        raise ValueError(f"mechanisms={' '.join(twice) or '()'} must be named, each once")
    base = _base(wanted)
    models = [dataclasses.replace(base, mixers=(text,)) for text in wanted.mechanisms]
    for config in at_lengths(models[0], wanted.lengths):
        placement.make_mesh(config)
    with _named(models[0]):
        first = budget.parameters(models[0])
    parameters = first if wanted.parameters is None else wanted.parameters
    fitted = []
    for config in models:
        with _named(config):
            fitted.append(budget.fit(config, parameters, tolerance=wanted.tolerance))
    shared = ("task", "model", "steps", "batch_size", "learning_rate", "target", "eval_every")
    settings = {name: getattr(base, name) for name in shared}
    settings |= {"parameters": parameters, "tolerance": wanted.tolerance}
    return Plan(fitted, settings | {"commonest": evaluation.commonest(base)})


@contextlib.contextmanager
def _named(config):
    """What is wrong within, with the mechanism that it is about."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{config.mixers[0]}: {error}") from None


def at_lengths(config, lengths: Sequence[int]) -> Iterator[configs.Experiment]:
    """The config at other lengths, always with as many tokens in a batch, rounded to examples."""
    tokens = config.batch_size * _length(config)
    for length in lengths:
        if length < 1:
            raise ValueError(f"{lengths=} must be at least 1")
        task = configs.changed(config.task, length=length)
        other = dataclasses.replace(config, task=task, batch_size=max(1, tokens // length))
        yield _with_positions(other)


def _base(wanted) -> configs.Experiment:
    """The config that the task's name stands for, with what the command line says otherwise."""
    name, options = registry.parse_call(wanted.task)
    config = configs.named(name)
    given = {x: getattr(wanted, x) for x in ("steps", "batch_size", "learning_rate", "model")}
    given = {x: value for x, value in given.items() if value is not None}
    config = dataclasses.replace(
        config, task=configs.changed(config.task, **options), mesh=wanted.mesh,
        cpu_devices=wanted.cpu_devices, target=wanted.target, **given,
    )  # fmt: skip
    record, _ = configs.make_task(config.task, "train")
    if record.kind != "tokens":
        raise ValueError(f"task={name} must be one of tokens, as mqar: compare trains an lm")
    every = max(1, config.steps // EVALUATIONS)
    config = dataclasses.replace(config, eval_every=every, save_every=5 * every, keep=2)
    return _with_positions(config)


def _with_positions(config) -> configs.Experiment:
    """With a learned position for every token, so that no mechanism lacks what another brings."""
    return dataclasses.replace(
        config, model=configs.changed(config.model, max_length=_length(config))
    )


def _length(config) -> int:
    _, source = configs.make_task(config.task, "train")
    return len(source[0]["inputs"])
