"""JSON that knows its own SHA-256, so that a changed character is an error and not a new value."""

import hashlib
import json
import os
from typing import Any

from attnjax.zoo import digest


def seal(body: Any, *, what: str) -> dict[str, Any]:
    """`{"body": body, "sha256": ...}`, to be stored as JSON and read back by `unseal`.

    Raises ValueError, naming `what`, unless JSON gives back exactly `body`: a tuple would return
    as a list, an integer key as a string, NaN not at all.
    """
    try:
        kept = json.loads(canonical(body)) == body
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be JSON: {error}") from None
    if not kept:
        raise ValueError(f"{what} must be lists, string-keyed dicts and plain values: {body!r}")
    return {"body": body, "sha256": _sha256(body)}


def unseal(document: Any, *, path: os.PathLike | str) -> Any:
    """The body of what `seal` made; CheckpointCorrupted, naming `path`, where it has changed."""
    if not isinstance(document, dict) or document.keys() != {"body", "sha256"}:
        raise digest.CheckpointCorrupted(path, None, "must be a body and its sha256")
    try:
        intact = _sha256(document["body"]) == document["sha256"]
    except ValueError:  # NaN, which Python reads and JSON does not have
        intact = False
    if not intact:
        raise digest.CheckpointCorrupted(path, None, "has changed since its sha256 was taken")
    return document["body"]


def canonical(body: Any) -> str:
    """The one text of `body`: sorted keys, no spaces, ASCII."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _sha256(body: Any) -> str:
    return hashlib.sha256(canonical(body).encode()).hexdigest()
