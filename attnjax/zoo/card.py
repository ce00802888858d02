"""What a checkpoint is: the model as data, how it was trained, and what it was measured to do."""

import dataclasses
import json
import os
import re
import statistics
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from attnjax.zoo import digest, sealed

# family-size.task[-variant]@version. No character of a name can lead out of a folder.
NAME = re.compile(r"[a-z0-9_]+-[a-z0-9_]+\.[a-z0-9_]+(-[a-z0-9_]+)*@[1-9][0-9]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """The description of one checkpoint. Everything in it is JSON; nothing in it is ever imported.

    Raises ValueError, naming the field, where the name or a dict has another form than stated here,
    or where a metric's mean, min and max are not those of its seeds.
    """

    name: str  # "gated_delta-tiny.mqar@1"
    task: dict  # {"name": a task of attnjax.tasks, "options": {...}}
    model: dict  # {"kind": "lm", "options": {...}}: arguments of attnjax.models.create
    mechanisms: tuple  # names in the registry
    config: dict  # the whole experiment
    commit: str  # of the code that trained it
    seed: int  # of these parameters
    command: str  # trains it again
    data_hash: str
    metrics: dict  # {"accuracy": summary([one value a seed])}
    reference: dict | None  # {"value": a published or known number, "source": where it stands}
    licence: str
    created: str  # ISO 8601
    parameters: int = 0  # how many numbers; `zoo.save` counts them
    sha256: dict = dataclasses.field(default_factory=dict)  # digest.digests; `zoo.save` takes them

    def __post_init__(self):
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name={self.name!r} must look like family-size.task@1")
        _check_keys("task", self.task, {"name", "options"})
        _check_keys("model", self.model, {"kind", "options"})
        if self.reference is not None:
            _check_keys("reference", self.reference, {"value", "source"})
        for name, metric in self.metrics.items():
            _check_keys(f"metrics[{name!r}]", metric, {"per_seed", "mean", "min", "max"})
            if metric != summary(metric["per_seed"]):
                raise ValueError(f"metrics[{name!r}] must be the summary of its seeds: {metric}")
        for name, leaf in self.sha256.items():
            _check_keys(f"sha256[{name!r}]", leaf, {"sha256", "shape", "dtype"})


def summary(per_seed: Sequence[float]) -> dict[str, Any]:
    """One metric of a card from its value with each seed."""
    values = list(per_seed)
    if not values:
        raise ValueError(f"{per_seed=} must hold the value of one seed at least")
    mean = statistics.fmean(values)
    return {"per_seed": values, "mean": mean, "min": min(values), "max": max(values)}


def dumps(card: Card) -> str:
    """The text of `card`, sealed with its own SHA-256; `loads` gives back an equal card.

    Raises ValueError, naming the field, for a value that isn't of the field's type or no JSON.
    """
    body = dataclasses.asdict(card) | {"mechanisms": list(card.mechanisms)}
    _check_types(body)
    return json.dumps(sealed.seal(body, what="card"), indent=2, sort_keys=True) + "\n"


def loads(text: bytes | str, *, path: os.PathLike | str) -> Card:
    """The card in `text`; CheckpointCorrupted, naming `path`, where it isn't one or has changed."""
    try:
        body = sealed.unseal(json.loads(text), path=path)
        _check_types(body)
        return Card(**body | {"mechanisms": tuple(body["mechanisms"])})
    except (ValueError, TypeError, RecursionError) as error:
        raise digest.CheckpointCorrupted(path, None, f"is no card: {error}") from None


def _check_types(body: Any) -> None:
    types = typing.get_type_hints(Card) | {"mechanisms": list}
    _check_keys("card", body, set(types))
    for name, kind in types.items():
        if not isinstance(body[name], kind):
            raise ValueError(f"{name} of a card must be {kind}, got {body[name]!r}")


def _check_keys(what: str, value: Any, keys: set[str]) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be a dict with {sorted(keys)}, got {value!r}")
    missing, unknown = sorted(keys - value.keys()), sorted(value.keys() - keys)
    if missing or unknown:
        raise ValueError(f"{what} must have {sorted(keys)}: {missing=}, {unknown=}")
