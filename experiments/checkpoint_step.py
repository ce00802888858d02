"""One step of a checkpoint directory: what it consists of, and reading it back verified.

Two items, written by orbax as one: `state`, the arrays under their paths, and `manifest`, sealed
JSON with the step, the digest of each array, the state of the data and the run's fingerprint.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from attnjax.zoo import digest, sealed
from experiments import checkpoint_state
from experiments import fingerprint as fingerprints

DIGITS = 9


def folder(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Where orbax keeps `step`."""
    return directory / f"{step:0{DIGITS}d}"


def newest(directory: pathlib.Path) -> int | None:
    """The newest step whose folder has its final name, so that orbax finished it; None without."""
    return max((int(path.name) for path in directory.glob("[0-9]" * DIGITS)), default=None)


def items(
    step: int, state: PyTree, data_state: Any, fingerprint: Mapping[str, Any]
) -> ocp.args.Composite:
    """What orbax is to write. Raises ValueError for what must not or can't be kept."""
    leaves = checkpoint_state.to_save(state)
    body = {"step": step, "leaves": digest.digests(leaves), "fingerprint": fingerprint}
    manifest = sealed.seal(body | {"data_state": data_state}, what="data_state")
    seal = np.frombuffer(bytes.fromhex(manifest["sha256"]), np.uint8)
    if (multihost_utils.process_allgather(seal) != seal[None]).any():
        raise ValueError(f"what is saved at {step=} must be the same on every process")
    return ocp.args.Composite(
        state=ocp.args.StandardSave(leaves), manifest=ocp.args.JsonSave(manifest)
    )


def read(
    manager: ocp.CheckpointManager,
    step: int,
    target: PyTree,
    *,
    fingerprint: Mapping[str, Any],
    allow_changes: Sequence[str],
) -> tuple[PyTree, Any]:
    """`step` as (state, data_state), each leaf placed as its target is.

    Raises CheckpointCorrupted where it isn't what was saved, FingerprintMismatch where the run was
    another, and ValueError where `target` has other leaves, shapes or dtypes.
    """
    path = folder(pathlib.Path(manager.directory), step)
    restore = lambda **item: manager.restore(step, args=ocp.args.Composite(**item))
    found = _on_every_process(lambda: restore(manifest=ocp.args.JsonRestore()), path)
    body = sealed.unseal(found["manifest"], path=path)
    if body["step"] != step:
        raise digest.CheckpointCorrupted(path, None, f"is a copy of step {body['step']}")
    fingerprints.check(body["fingerprint"], fingerprint, allow_changes=allow_changes, path=path)
    leaves = checkpoint_state.to_restore(target, body["leaves"], path=path)
    found = _on_every_process(lambda: restore(state=ocp.args.StandardRestore(leaves)), path)
    state = found["state"]
    _on_every_process(lambda: digest.verify(state, body["leaves"], path=path), path)
    ordered = [state[name] for name in leaves]
    return jax.tree.unflatten(jax.tree.structure(target), ordered), body["data_state"]


def _on_every_process(action: Callable[[], Any], path: pathlib.Path) -> Any:
    """`action()`; CheckpointCorrupted on every process if it failed on one.

    Damaged files make orbax and tensorstore raise a dozen types, plain Exception among them. orbax
    then abandons its other reads, which Python may report on stderr as ignored exceptions.
    """
    failure, result = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    if not multihost_utils.process_allgather(np.array(failure is not None)).any():
        return result
    if isinstance(failure, digest.CheckpointCorrupted):
        raise failure
    reason = f"{type(failure).__name__}: {failure}" if failure else "is bad on another process"
    raise digest.CheckpointCorrupted(path, None, reason.partition("\n")[0]) from failure
