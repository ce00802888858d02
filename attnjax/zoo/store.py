"""Checkpoints as folders: `<root>/<name>/card.json` and `params.safetensors`.

A folder may come from anyone, so loading one runs none of its content: the card is data, the
weights are safetensors, and the module is built by a name that attnjax.models knows. Names of
leaves are keys and never become file names. Links are not followed, and a size is checked before a
file is read. The hashes guard against damage, not against a forger, who would write new ones.
"""

import dataclasses
import fnmatch
import os
import pathlib
import stat
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from attnjax import models
from attnjax.core import registry
from attnjax.zoo import card, digest, tensors

SHIPPED = pathlib.Path(__file__).parent / "checkpoints"
CARD, PARAMS = "card.json", "params.safetensors"
CARD_BYTES = 1 << 20


def list_cards(
    pattern: str = "*", *, root: os.PathLike | str | None = None
) -> tuple[card.Card, ...]:
    """The cards whose names match `pattern` (as in "gla-*"), sorted by name.

    Looks in `root`, or else in the shipped checkpoints and the folders in ATTNJAX_ZOO (separated as
    in PATH). Raises ValueError where a root doesn't exist and CheckpointCorrupted for a bad card.
    """
    names = {path.name for folder in _roots(root) for path in folder.iterdir()}
    names = sorted(name for name in names if card.NAME.fullmatch(name))
    return tuple(_card(_find(name, root)) for name in names if fnmatch.fnmatchcase(name, pattern))


def load(
    name: str, *, root: os.PathLike | str | None = None, max_bytes: int = 1 << 30
) -> tuple[nn.Module, PyTree[jax.Array], card.Card]:
    """The checkpoint `name`: (module, params, card), as in `module.apply({"params": params}, x)`.

    Raises ValueError for a name that is malformed, unknown or in two roots, CheckpointCorrupted
    where the folder holds anything but what was saved, or weights larger than `max_bytes`.
    """
    folder = _find(name, root)
    record = _card(folder)
    path = folder / PARAMS
    flat = tensors.loads(_read(path, max_bytes), path=path)
    digest.verify(flat, record.sha256, path=path)
    try:
        params = jax.tree.map(jnp.asarray, _nested(flat))
    except ValueError as error:
        raise digest.CheckpointCorrupted(path, None, str(error)) from None
    return models.create(record.model["kind"], **record.model["options"]), params, record


def save(name: str, params: PyTree, record: card.Card, *, root: os.PathLike | str) -> pathlib.Path:
    """Writes a checkpoint and returns its folder; `record` gets its hashes and its parameter count.

    `params`: nested dicts of arrays. The folder appears whole or not at all. What has a name never
    changes: saving the same again does nothing, anything else under that name is a ValueError.
    """
    if record.name != name:
        raise ValueError(f"{name=} must be the name on the card, {record.name!r}")
    flat = {path: np.asarray(leaf) for path, leaf in digest.named_leaves(params).items()}
    if jax.tree.structure(_nested(flat)) != jax.tree.structure(params):
        raise ValueError("params must be nested dicts whose keys are strings without a slash")
    count = sum(array.size for array in flat.values())
    record = dataclasses.replace(record, parameters=count, sha256=digest.digests(flat))
    files = {CARD: card.dumps(record).encode(), PARAMS: tensors.dumps(flat)}
    folder = pathlib.Path(root) / name
    if not os.path.lexists(folder):
        _write(folder, files)
    elif any(_read(_find(name, root) / file) != data for file, data in files.items()):
        raise ValueError(f"{folder} exists with another content: save under the next version")
    return folder


def _write(folder: pathlib.Path, files: dict[str, bytes]) -> None:
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    for file, data in files.items():
        (partial / file).write_bytes(data)
    partial.rename(folder)


def _roots(root: os.PathLike | str | None) -> list[pathlib.Path]:
    if root is None:
        extra = os.environ.get("ATTNJAX_ZOO", "").split(os.pathsep)
        roots = [SHIPPED, *(pathlib.Path(folder) for folder in extra if folder)]
    else:
        roots = [pathlib.Path(root)]
    for folder in roots:
        if not folder.is_dir():
            raise ValueError(f"root={str(folder)!r} must be an existing folder")
    return roots


def _find(name: str, root: os.PathLike | str | None) -> pathlib.Path:
    if not card.NAME.fullmatch(name):
        raise ValueError(f"{name=} must look like family-size.task@1")
    roots = _roots(root)
    found = [folder / name for folder in roots if os.path.lexists(folder / name)]
    if not found:
        known = (path.name for folder in roots for path in folder.iterdir())
        raise ValueError(f"no checkpoint is called {name!r}{registry.nearest(name, known)}")
    if len(found) > 1:
        raise ValueError(f"{name=} must be in one root only: {', '.join(map(str, found))}")
    if not stat.S_ISDIR(found[0].lstat().st_mode):
        raise digest.CheckpointCorrupted(found[0], None, "must be a folder and no link")
    return found[0]


def _card(folder: pathlib.Path) -> card.Card:
    record = card.loads(_read(folder / CARD, CARD_BYTES), path=folder / CARD)
    if record.name != folder.name:
        raise digest.CheckpointCorrupted(folder / CARD, None, f"is the card of {record.name}")
    return record


def _read(path: pathlib.Path, max_bytes: int = sys.maxsize) -> bytes:
    if not os.path.lexists(path):
        raise digest.CheckpointCorrupted(path, None, "is missing")
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise digest.CheckpointCorrupted(path, None, "must be a file and no link")
    if status.st_size > max_bytes:
        detail = f"has {status.st_size} bytes, more than the {max_bytes} allowed"
        raise digest.CheckpointCorrupted(path, None, detail)
    return path.read_bytes()


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in sorted(flat.items()):  # "a" comes before "a/b", which may then not exist
        *parents, last = path.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
            if not isinstance(branch, dict):
                raise ValueError(f"leaf {path} must not lie inside another leaf")
        branch[last] = leaf
    return tree
