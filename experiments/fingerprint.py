"""What a run is made of, as nested JSON: two runs with one fingerprint are the same run.

Iterators of grain accept a changed seed or batch size in silence and give other data. So a
checkpoint carries the fingerprint of its run (config, data, code version; nothing about the mesh,
which may change), and a resume compares it.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_ABSENT = "nothing"


class FingerprintMismatch(ValueError):
    """A checkpoint belongs to another run. `fields`: {dotted field: (saved, now)}."""

    def __init__(self, path: os.PathLike | str, fields: Mapping[str, tuple[Any, Any]]):
        self.path, self.fields = path, dict(fields)
        first = [f"{name} was {old!r} and is {new!r}" for name, (old, new) in fields.items()][:3]
        more = f" (and {len(fields) - 3} more)" if len(fields) > 3 else ""
        advice = "name them in allow_changes or use another directory"
        super().__init__(f"{path}: {'; '.join(first)}{more}; {advice}")


def normalise(fingerprint: Mapping) -> dict[str, Any]:
    """The fingerprint as JSON gives it back, tuples as lists; ValueError where it is no JSON."""
    try:
        return json.loads(json.dumps(fingerprint, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"fingerprint must be JSON: {error}") from None


def check(
    saved: Mapping, now: Mapping, *, allow_changes: Sequence[str], path: os.PathLike | str
) -> None:
    """Raises FingerprintMismatch for each field that differs and that nothing allows to.

    `allow_changes` holds dotted fields such as "config.steps"; "config" allows all below it.
    """
    saved, now = dict(_fields(saved)), dict(_fields(now))
    pairs = {name: (saved.get(name, _ABSENT), now.get(name, _ABSENT)) for name in saved | now}
    differ = {
        name: (old, new)
        for name, (old, new) in pairs.items()
        if old != new and not any(f"{name}.".startswith(f"{field}.") for field in allow_changes)
    }
    if differ:
        raise FingerprintMismatch(path, differ)


def _fields(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
