import collections
import json
import os
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.zoo import digest
from experiments import checkpointing, fingerprint

Moments = collections.namedtuple("Moments", ["mean", "count"])


def _open(directory, **options):
    return checkpointing.Checkpointer(directory, **{"fingerprint": {"lr": 0.1}} | options)


def _state(seed: int) -> dict:
    key = jax.random.key(seed)
    w = jax.random.normal(key, (4, 6))
    return {
        "params": {"w": w, "half": w.astype(jnp.bfloat16)},
        "moments": (Moments(mean=w + 1, count=jnp.int32(seed)), ()),
        "key": key,
        "host": np.arange(3) + seed,
    }


def _assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert digest.digests(actual) == digest.digests(expected)


@pytest.fixture
def two_steps(tmp_path):
    with _open(tmp_path) as checkpointer:
        checkpointer.save(1, _state(1), {"next": 1})
        checkpointer.save(2, _state(2), {"next": 2})
    return tmp_path


def test_round_trip_keeps_every_bit_type_and_container(two_steps):
    with _open(two_steps) as checkpointer:
        restored = checkpointer.restore_latest_valid(_state(0))
        assert (restored.step, restored.data_state, restored.skipped) == (2, {"next": 2}, ())
        _assert_equal(restored.state, _state(2))
        assert isinstance(restored.state["host"], np.ndarray)


def test_a_new_directory_has_nothing_to_restore(tmp_path):
    with _open(tmp_path / "run") as checkpointer:
        assert checkpointer.restore_latest_valid(_state(0)) is None
        checkpointer.save(1, _state(1))
        assert checkpointer.restore_latest_valid(_state(0)).step == 1


def test_old_steps_go_by_a_rename_and_leave_no_trash(tmp_path):
    with _open(tmp_path, keep=2) as checkpointer:
        for step in range(1, 5):
            checkpointer.save(step, _state(step))
        checkpointer.wait()
        assert [path.name for path in (tmp_path / "todelete").iterdir()] == ["000000002"]
    assert sorted(os.listdir(tmp_path)) == ["000000003", "000000004"]


def test_due_is_every_save_every_th_step(tmp_path):
    with _open(tmp_path, save_every=3) as checkpointer:
        assert [step for step in range(1, 10) if checkpointer.due(step)] == [3, 6, 9]


def test_arrays_may_be_donated_or_overwritten_after_save(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    array, host = jnp.full((500_000,), 3.0), np.full((500_000,), 4.0)
    with _open(tmp_path) as checkpointer:
        checkpointer.save(1, {"array": array, "host": host})
        overwrite(array).block_until_ready()
        host[:] = -1
        target = {"array": jax.ShapeDtypeStruct((500_000,), jnp.float32), "host": host}
        state = checkpointer.restore_latest_valid(target).state
    assert (state["array"] == 3).all() and (state["host"] == 4).all()


def test_restores_to_another_mesh(tmp_path):
    mesh = lambda n: jax.make_mesh(
        (n,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n]
    )
    w = jnp.arange(24.0).reshape(4, 6)
    with _open(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jax.device_put(w, NamedSharding(mesh(4), P("x")))})
        for n, spec in ((2, P(None, "x")), (1, P())):
            sharding = NamedSharding(mesh(n), spec)
            target = {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)}
            restored = checkpointer.restore_latest_valid(target).state["w"]
            assert restored.sharding == sharding and (restored == w).all()


def test_a_reader_beside_a_running_job_changes_nothing(two_steps):
    unfinished = two_steps / "000000003.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with _open(two_steps, read_only=True) as reader:
        assert reader.restore_latest_valid(_state(0)).step == 2
        with pytest.raises(ValueError, match="read_only"):
            reader.save(3, _state(3))
    assert unfinished.exists()
    with _open(two_steps) as writer:
        writer.restore_latest_valid(_state(0))
        writer.save(4, _state(4))
    assert not unfinished.exists()


def test_a_reader_of_no_directory_creates_none(tmp_path):
    with _open(tmp_path / "run", read_only=True) as reader:
        assert reader.restore_latest_valid(_state(0)) is None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options", [{"keep": 1}, {"save_every": 0}, {"fingerprint": {"a": object()}}]
)
def test_wrong_options_are_named(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        _open(tmp_path, **options)


def test_a_step_that_is_not_later_is_refused(two_steps):
    with _open(two_steps) as checkpointer:
        with pytest.raises(ValueError, match=r"holds steps \[1, 2\]"):
            checkpointer.save(3, _state(3))
        checkpointer.restore_latest_valid(_state(0))
        for step in (1, 2):
            with pytest.raises(ValueError, match="later than self.last_step=2"):
                checkpointer.save(step, _state(step))
        checkpointer.save(3, _state(3))


def test_saving_goes_on_from_a_rollback(two_steps):
    with _open(two_steps) as checkpointer:
        assert checkpointer.restore_latest_valid(_state(0), before=2).step == 1
        checkpointer.save(2, _state(20))
        restored = checkpointer.restore_latest_valid(_state(0))
    _assert_equal(restored.state, _state(20))
    assert sorted(os.listdir(two_steps)) == ["000000001", "000000002"]


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    with _open(tmp_path) as checkpointer, pytest.raises(ValueError, match="w must be finite"):
        checkpointer.save(1, {"w": jnp.array([1.0, jnp.nan])})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("data_state", [b"bytes", {"a": (1, 2)}, {1: 2}, {"a": float("nan")}])
def test_data_state_must_survive_json(tmp_path, data_state):
    with _open(tmp_path) as checkpointer, pytest.raises(ValueError, match="data_state must be"):
        checkpointer.save(1, _state(1), data_state)


def test_a_target_of_another_form_is_refused(two_steps):
    target = _state(0) | {"host": np.zeros(3, np.int8)}
    with _open(two_steps) as checkpointer, pytest.raises(ValueError, match="host must have dtype"):
        checkpointer.restore_latest_valid(target)


def test_a_run_with_another_fingerprint_is_refused(two_steps):
    other = {"lr": 0.2, "seed": 1}
    mismatch = pytest.raises(fingerprint.FingerprintMismatch, match="lr was 0.1 and is 0.2; seed")
    with _open(two_steps, fingerprint=other) as checkpointer, mismatch:
        checkpointer.restore_latest_valid(_state(0))
    with _open(two_steps, fingerprint=other, allow_changes=("lr", "seed")) as checkpointer:
        assert checkpointer.restore_latest_valid(_state(0)).step == 2


def test_a_save_that_orbax_skips_is_an_error(tmp_path, monkeypatch):
    with _open(tmp_path) as checkpointer:
        monkeypatch.setattr(checkpointer._manager, "save", lambda *_, **__: False)
        with pytest.raises(RuntimeError, match="skipped step 1"):
            checkpointer.save(1, _state(1))


@pytest.fixture
def full_disk():
    """Makes files end at 1 MB, so that a large save fails in the background."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size=1 << 20):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    yield limit
    limit(limits[0])


LARGE = {"w": np.random.default_rng(0).integers(0, 1 << 62, 1 << 18)}


@pytest.mark.parametrize("call", ["wait", "close", "save", "restore_latest_valid"])
def test_a_save_that_fails_in_the_background_is_raised(tmp_path, full_disk, call):
    arguments = {"save": (3, LARGE), "restore_latest_valid": (LARGE,)}.get(call, ())
    checkpointer = _open(tmp_path)
    checkpointer.save(1, LARGE)
    checkpointer.wait()
    full_disk()
    checkpointer.save(2, LARGE)
    with pytest.raises(RuntimeError, match="step 2 was not saved"):
        getattr(checkpointer, call)(*arguments)
    if call != "close":
        checkpointer.close()


def test_check_raises_without_waiting_for_the_next_save(tmp_path, full_disk):
    with _open(tmp_path) as checkpointer:
        full_disk()
        checkpointer.save(1, LARGE)
        with pytest.raises(RuntimeError, match="step 1 was not saved"):
            for _ in range(600):
                checkpointer.check()
                time.sleep(0.05)
        checkpointer.check()


def test_a_step_that_failed_can_be_saved_again(tmp_path, full_disk):
    with _open(tmp_path) as checkpointer:
        checkpointer.save(1, _state(1))
        checkpointer.wait()
        full_disk()
        checkpointer.save(2, LARGE)
        with pytest.raises(RuntimeError):
            checkpointer.wait()
        checkpointer.save(2, _state(2))
        assert checkpointer.restore_latest_valid(_state(0)).step == 2


def test_the_manifest_is_readable_json(two_steps):
    manifest = json.loads((two_steps / "000000002/manifest/metadata").read_text())
    assert manifest["body"]["data_state"] == {"next": 2}
    assert manifest["body"]["leaves"]["params/half"]["dtype"] == "bfloat16"
