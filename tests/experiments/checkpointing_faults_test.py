"""Kills and damage: what is restored is exactly what was saved, or an older step with a reason."""

import gc
import os
import pathlib
import random
import re
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.zoo import digest
from experiments import checkpointing
from tests.experiments import killed_run

# Where one read fails, orbax abandons the others; Python reports each when it is collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

KINDS = (
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
    "manifest/commit_success.txt",
    "manifest/metadata",
    "state/_METADATA",
    "state/_sharding",
    "state/array_metadatas/process_0",
    "state/commit_success.txt",
    "state/d/*",
    "state/manifest.ocdbt",
    "state/ocdbt.process_0/d/*",
    "state/ocdbt.process_0/manifest.ocdbt",
)


def _open(directory):
    return checkpointing.Checkpointer(directory, fingerprint={})


def _state(step: int) -> dict:
    key = jax.random.fold_in(jax.random.key(0), step)
    return {"key": key, "count": jnp.int32(step), "w": jax.random.bits(key, (32, 8), jnp.uint32)}


@pytest.fixture(scope="module", autouse=True)
def abandoned_reads_end_here():
    yield
    time.sleep(0.2)
    gc.collect()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    with _open(directory) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, _state(step), {"next": step})
    return directory


@pytest.fixture
def damaged(saved, tmp_path):
    """(run directory, its newest step), to be damaged."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run", tmp_path / "run/000000002"


def _restore(directory):
    """The step that is restored, after a check that it is exactly what was saved."""
    with _open(directory) as checkpointer:
        restored = checkpointer.restore_latest_valid(_state(0))
    assert restored.data_state == {"next": restored.step}
    digest.verify(restored.state, digest.digests(_state(restored.step)), path=directory)
    assert [step for step, _ in restored.skipped] == [2] * (restored.step == 1)
    return restored


def _kind(path: pathlib.PurePath) -> str:
    return re.sub(r"[0-9a-f]{32}", "*", path.as_posix())


def _files(step: pathlib.Path, kind: str) -> list[pathlib.Path]:
    files = (path for path in step.rglob("*") if path.is_file())
    return sorted(path for path in files if _kind(path.relative_to(step)) == kind)


def _flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_kinds_are_all_the_files_of_a_checkpoint(saved):
    step = saved / "000000002"
    files = (path.relative_to(step) for path in step.rglob("*") if path.is_file())
    assert tuple(sorted({_kind(path) for path in files})) == KINDS


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete", "zero", "wrong JSON"])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_to_any_file_is_harmless_or_detected(damaged, kind, damage):
    run, step = damaged
    chance = random.Random(kind)
    for file in _files(step, kind):
        data = file.read_bytes()
        bits = [chance.randrange(8 * len(data)) for _ in range(4)] if data else []
        versions = {
            "flip": [_flip(data, bit) for bit in bits],
            "truncate": [data[: len(data) // 2], data[:-1]],
            "empty": [b""],
            "delete": [None],
            "zero": [bytes(len(data))],
            "wrong JSON": [b"[]", b'{"body": NaN, "sha256": ""}', b"[" * 99_999],
        }
        for version in versions[damage]:
            file.unlink()
            if version is not None:
                file.write_bytes(version)
            _restore(run)
            file.write_bytes(data)


def test_every_flipped_bit_of_an_array_is_detected(damaged):
    run, step = damaged
    w = np.asarray(_state(2)["w"]).tobytes()
    [file] = [file for file in _files(step, "state/ocdbt.process_0/d/*") if w in file.read_bytes()]
    data = file.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(w)), 8):
        file.write_bytes(_flip(data, 8 * data.index(w) + bit))
        restored = _restore(run)
        assert restored.step == 1 and restored.skipped[0][1].startswith("w has sha256 ")


@pytest.mark.parametrize("old, new", [("2", "3"), ('"next"', '"skip"'), ("int32", "uint8")])
def test_a_changed_manifest_is_detected(damaged, old, new):
    run, step = damaged
    path = step / "manifest/metadata"
    path.write_text(path.read_text().replace(old, new, 1))
    [(_, reason)] = _restore(run).skipped
    assert reason == "has changed since its sha256 was taken"


@pytest.mark.parametrize("item", ["manifest", "state"])
def test_a_missing_item_is_detected(damaged, item):
    run, step = damaged
    shutil.rmtree(step / item)
    assert _restore(run).step == 1


def test_a_step_under_another_number_is_detected(damaged):
    run, step = damaged
    shutil.rmtree(step)
    shutil.copytree(run / "000000001", step)
    assert _restore(run).skipped == ((2, "is a copy of step 1"),)


def test_an_empty_folder_is_no_step(damaged):
    run, _ = damaged
    (run / "000000009").mkdir()
    assert _restore(run).skipped == ()
    with _open(run) as checkpointer:
        assert checkpointer.restore_latest_valid(_state(0)).step == 2
        checkpointer.save(3, _state(3))
    assert sorted(os.listdir(run)) == ["000000001", "000000002", "000000003"]


def test_empty_folders_alone_are_a_new_run(tmp_path):
    (tmp_path / "000000009").mkdir()
    with _open(tmp_path) as checkpointer:
        assert checkpointer.restore_latest_valid(_state(0)) is None
        checkpointer.save(1, _state(1))
    assert os.listdir(tmp_path) == ["000000001"]


def test_a_bad_step_is_saved_again(damaged):
    run, step = damaged
    (step / "manifest/metadata").unlink()
    with _open(run) as checkpointer:
        assert checkpointer.restore_latest_valid(_state(0)).step == 1
        checkpointer.save(2, _state(2), {"next": 2})
    assert _restore(run).step == 2


def test_nothing_valid_is_an_error_that_names_every_step(damaged):
    run, step = damaged
    (step / "manifest/metadata").write_text("{}")
    shutil.rmtree(run / "000000001/state")
    with _open(run) as checkpointer, pytest.raises(digest.CheckpointCorrupted) as caught:
        checkpointer.restore_latest_valid(_state(0))
    assert re.search("no valid step: step 2: must be a body .*; step 1: ", str(caught.value))
    assert "\n" not in str(caught.value)


def test_kill_9_at_any_moment_loses_nothing_durable(start, tmp_path):
    delays = random.Random(0)
    durable = 0
    for steps in (2, 0, 4, 1, 0, 3, 2, 5):  # 0: most likely amid its restore
        delay = delays.uniform(0, 0.1 if steps else 0.6)
        run = start(killed_run.train, tmp_path)
        durable = max(durable, _kill(run, steps, delay))
        _assert_intact(tmp_path, durable)
    assert durable >= 17


def _kill(run, steps: int, delay: float) -> int:
    """Kills a run `delay` seconds after `steps` durable steps; returns the last of these."""
    said = "".join(next(run.output) for _ in range(steps))
    time.sleep(delay)
    status, rest = run.stop(signal.SIGKILL)
    assert status == -signal.SIGKILL
    return max(map(int, re.findall(r"^durable (\d+)$", said + rest, re.MULTILINE)), default=0)


def _assert_intact(directory: pathlib.Path, durable: int) -> None:
    """No step that was ever listed is damaged, the oldest kept included."""
    target = killed_run.state_at(0)
    options = {"fingerprint": {}, "read_only": True}
    with checkpointing.Checkpointer(directory, **options) as reader:
        restored, newest = reader.restore_latest_valid(target), 0
        while restored:
            expected = killed_run.state_at(restored.step)
            digest.verify(restored.state, digest.digests(expected), path=directory)
            assert restored.skipped == () and restored.data_state == {"next": restored.step}
            newest = max(newest, restored.step)
            restored = reader.restore_latest_valid(target, before=restored.step)
    assert newest >= durable
