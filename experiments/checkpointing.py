"""Checkpoints that are exactly what was saved, or are refused with a reason.

A thin layer over orbax, which writes, renames, deletes and reshards. It closes what orbax leaves
open: a flipped bit is read back as another number (here: a SHA-256 of each leaf, verified), a
damaged newest step ends the run (here: the newest good step is used and the bad ones are named), a
save that is skipped or fails in the background goes unnoticed (here: an error), and a run resumes
on other data or options (here: a fingerprint).

    with Checkpointer(directory, fingerprint={"config": ..., "data": ...}) as checkpointer:
        restored = checkpointer.restore_latest_valid(state)
        ...
        if checkpointer.due(step):
            checkpointer.save(step, state, data_state)
"""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from attnjax.zoo import digest
from experiments import checkpoint_step
from experiments import fingerprint as fingerprints

_TRASH = "todelete"
_NO_STEP = -1


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held, and the newer steps that were bad: ((step, reason), ...)."""

    step: int
    state: PyTree
    data_state: Any
    skipped: tuple[tuple[int, str], ...]


class Checkpointer:
    """The checkpoints of one run in one local directory, written by one job.

    A save goes on in the background: it is durable once the next `save`, `wait` or `close` has
    returned. If it failed, each of these raises, and so does `check`. After a kill at any moment
    the newest durable step can be restored. Every process of a distributed run makes the same
    calls.

    `fingerprint`: nested JSON of what makes the run (`experiments.fingerprint`);
    `allow_changes`: its fields that may differ, as in ("config.steps",).
    `keep`: how many steps stay, at least 2, so that a damaged one has a predecessor.
    `save_every`: what `due` answers by. `read_only`: for a reader beside a running job.
    """

    def __init__(
        self,
        directory: os.PathLike | str,
        *,
        fingerprint: Mapping,
        keep: int = 3,
        save_every: int = 1000,
        allow_changes: Sequence[str] = (),
        read_only: bool = False,
    ):
        if keep < 2:
            raise ValueError(f"{keep=} must be at least 2")
        if save_every < 1:
            raise ValueError(f"{save_every=} must be at least 1")
        self.directory = pathlib.Path(directory).resolve()
        self.last_step = _NO_STEP  # saved or restored
        self._fingerprint = fingerprints.normalise(fingerprint)
        self._allow_changes = tuple(allow_changes)
        self._save_every = save_every
        self._read_only = read_only
        self._manager = _open(self.directory, keep, read_only)
        self._unread = self._steps()  # of an earlier run: nothing may be saved over them

    def due(self, step: int) -> bool:
        """Whether `step` is one of every `save_every`."""
        return step % self._save_every == 0

    def save(self, step: int, state: PyTree, data_state: Any = None) -> None:
        """Starts to write `state` (a tree of arrays, typed PRNG keys included) and `data_state`.

        The arrays may be donated or overwritten once it returns. `data_state` is JSON, the same on
        every process. Steps newer than the restored one, bad or rolled back, are deleted.

        Raises ValueError for a step that isn't later than `last_step`, in a directory whose steps
        were never restored, and for a state that isn't made of finite arrays; RuntimeError where
        this or the previous save failed.
        """
        self.wait()
        self._check_step(step)
        items = checkpoint_step.items(step, state, data_state, self._fingerprint)
        self._delete_newer()
        if not self._manager.save(step, args=items):
            raise RuntimeError(f"{self.directory}: orbax skipped step {step}")
        self.last_step = step

    def restore_latest_valid(self, target: PyTree, *, before: int | None = None) -> Restored | None:
        """The newest step (earlier than `before`) that is what was saved; None if there is no step.

        `target`: a tree like the state, of arrays or jax.ShapeDtypeStruct. Each leaf arrives with
        the sharding of its target, whatever mesh it was saved from; a numpy array as numpy. The
        next save goes on from there.

        Raises CheckpointCorrupted, with every step and its reason, where none is valid;
        FingerprintMismatch for a checkpoint of another run; ValueError for a target with other
        leaves, shapes or dtypes.
        """
        self.wait()
        skipped = []
        steps = [step for step in self._steps() if before is None or step < before]
        for step in sorted(steps, reverse=True):
            try:
                state, data_state = self._read(step, target)
            except digest.CheckpointCorrupted as error:
                skipped.append((step, error.reason))
                continue
            self._go_on_from(step)
            return Restored(step, state, data_state, tuple(skipped))
        if skipped:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in skipped)
            raise digest.CheckpointCorrupted(self.directory, None, f"no valid step: {reasons}")
        self._go_on_from(_NO_STEP)
        return None

    def wait(self) -> None:
        """Returns once the last save is durable; RuntimeError if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            failed = self.last_step
            self.last_step = max(self._manager.all_steps(), default=_NO_STEP)
            raise RuntimeError(f"{self.directory}: step {failed} was not saved: {error}") from error

    def check(self) -> None:
        """RuntimeError if the last save has failed by now; call it as often as you like."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def close(self) -> None:
        """Waits for the last save and releases everything; RuntimeError if that save failed."""
        try:
            self.wait()
        finally:
            self._empty_trash()
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _read(self, step: int, target: PyTree) -> tuple[PyTree, Any]:
        changes = self._allow_changes
        return checkpoint_step.read(
            self._manager, step, target, fingerprint=self._fingerprint, allow_changes=changes
        )

    def _go_on_from(self, step: int) -> None:
        self.last_step, self._unread = step, []

    def _steps(self) -> list[int]:
        """Steps that orbax lists, less the empty folders among them."""
        holds_files = lambda step: any(checkpoint_step.folder(self.directory, step).glob("*"))
        return [step for step in self._manager.all_steps() if holds_files(step)]

    def _check_step(self, step: int) -> None:
        if self._read_only:
            raise ValueError(f"{self.directory} was opened with read_only=True")
        if self._unread:
            raise ValueError(
                f"{self.directory} holds steps {self._unread}: restore one or use another directory"
            )
        if step <= self.last_step:
            raise ValueError(f"{step=} must be later than {self.last_step=}")

    def _delete_newer(self) -> None:
        for step in self._manager.all_steps():
            if step > self.last_step:
                self._manager.delete(step)
        self._empty_trash()

    def _empty_trash(self) -> None:
        # A step is deleted by a rename into the trash: a kill amid a plain deletion would leave
        # half of it listed as a step. What can't be removed costs space and nothing else.
        if jax.process_index() == 0 and not self._read_only:
            shutil.rmtree(self.directory / _TRASH, ignore_errors=True)


def _open(directory: pathlib.Path, keep: int, read_only: bool) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        step_format_fixed_length=checkpoint_step.DIGITS,
        preservation_policy=checkpoint_managers.LatestN(keep),
        todelete_subdir=_TRASH,
        create=not read_only,
        cleanup_tmp_directories=not read_only,
        save_root_metadata=False,
    )
    try:
        return ocp.CheckpointManager(directory, options=options)
    except Exception:  # the times of one step can't be read, which must not hide the others
        options.lightweight_initialize = True
        return ocp.CheckpointManager(directory, options=options)
