import dataclasses
import json
import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import zoo
from attnjax.zoo import digest, sealed, store

NAME = "gla-tiny.mqar@1"
X = np.ones((2, 3), np.float32)


class Fake(nn.Module):
    """Stands for a model: the zoo asks attnjax.models for it by kind and options."""

    features: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features, param_dtype=jnp.bfloat16)(nn.Dense(4)(x))


@pytest.fixture(autouse=True)
def fake_models(monkeypatch):
    kinds = {"fake": Fake}
    create = lambda kind, **options: kinds[kind](**options)
    monkeypatch.setattr(store.models, "create", create)
    monkeypatch.delenv("ATTNJAX_ZOO", raising=False)


def _card(name=NAME, **changes) -> zoo.Card:
    fields = {
        "name": name,
        "task": {"name": "mqar", "options": {}},
        "model": {"kind": "fake", "options": {"features": 5}},
        "mechanisms": ("gla",),
        "config": {"lr": 0.1},
        "commit": "0" * 40,
        "seed": 0,
        "command": "attnjax train mqar",
        "data_hash": "1234",
        "metrics": {"accuracy": zoo.summary([0.9, 0.8, 1.0])},
        "reference": {"value": 0.99, "source": "a figure"},
        "licence": "Apache-2.0",
        "created": "2026-11-21",
    }
    return zoo.Card(**fields | changes)


def _params():
    return Fake(5).init(jax.random.key(0), X)["params"]


@pytest.fixture
def saved(tmp_path):
    """The folder of one checkpoint."""
    return zoo.save(NAME, _params(), _card(), root=tmp_path)


def _load(folder: pathlib.Path):
    return zoo.load(folder.name, root=folder.parent)


def _assert_corrupted(folder: pathlib.Path, message: str) -> None:
    with pytest.raises(zoo.CheckpointCorrupted, match=message) as caught:
        _load(folder)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def test_round_trip(saved):
    module, params, card = _load(saved)
    digest.verify(params, digest.digests(_params()), path="params")
    expected = Fake(5).apply({"params": _params()}, X)
    assert (module.apply({"params": params}, X) == expected).all()
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert card.parameters == 3 * 4 + 4 + 4 * 5 + 5
    assert card.sha256 == digest.digests(_params())
    assert card == _card(parameters=card.parameters, sha256=card.sha256)


def test_list_is_sorted_and_filtered(tmp_path):
    names = ["gla-tiny.mqar@2", "gla-tiny.mqar@1", "gqa-tiny.mqar@1"]
    for name in names:
        zoo.save(name, _params(), _card(name), root=tmp_path)
    (tmp_path / "README.md").write_text("no checkpoint")
    found = lambda *pattern: [card.name for card in zoo.list(*pattern, root=tmp_path)]
    assert found() == sorted(names)
    assert found("gla-*") == ["gla-tiny.mqar@1", "gla-tiny.mqar@2"]
    assert found("*.copy@*") == []


def test_extra_roots_come_from_the_environment(saved, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    monkeypatch.setenv("ATTNJAX_ZOO", f"{saved.parent}{os.pathsep}{other}")
    assert NAME in [card.name for card in zoo.list()]
    assert zoo.load(NAME)[2].name == NAME
    zoo.save(NAME, _params(), _card(seed=1), root=other)
    with pytest.raises(ValueError, match="must be in one root only"):
        zoo.load(NAME)


def test_what_ships_is_intact():
    for card in zoo.list():
        path = zoo.SHIPPED / card.name / store.PARAMS
        flat = store.tensors.loads(path.read_bytes(), path=path)
        digest.verify(flat, card.sha256, path=path)


def test_a_root_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="root=.*must be an existing folder"):
        zoo.list(root=tmp_path / "none")


def test_saving_the_same_again_does_nothing(saved):
    before = {path: path.stat().st_mtime_ns for path in saved.iterdir()}
    assert zoo.save(NAME, _params(), _card(), root=saved.parent) == saved
    assert {path: path.stat().st_mtime_ns for path in saved.iterdir()} == before
    assert os.listdir(saved.parent) == [NAME]


def test_a_name_never_gets_another_content(saved):
    other = jax.tree.map(lambda leaf: leaf + 1, _params())
    for params, card in ((other, _card()), (_params(), _card(licence="MIT"))):
        with pytest.raises(ValueError, match="exists with another content"):
            zoo.save(NAME, params, card, root=saved.parent)
    digest.verify(_load(saved)[1], digest.digests(_params()), path="params")


@pytest.mark.parametrize(
    "params",
    [
        {"a/b": jnp.ones(1)},
        {"a": [jnp.ones(1)]},
        {0: jnp.ones(1)},
        {"a": {"": jnp.ones(1)}, "b": {}},
    ],
)
def test_params_that_would_not_come_back_are_refused(tmp_path, params):
    with pytest.raises(ValueError, match="params must be nested dicts"):
        zoo.save(NAME, params, _card(), root=tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_card_must_have_the_name(tmp_path):
    with pytest.raises(ValueError, match="must be the name on the card, 'gla-tiny.mqar@1'"):
        zoo.save("gla-tiny.mqar@2", _params(), _card(), root=tmp_path)


@pytest.mark.parametrize(
    "name", ["../gla-tiny.mqar@1", "/etc/gla-tiny.mqar@1", "..", ".", "", "gla-tiny.mqar@1/../x"]
)
def test_no_name_leaves_the_root(saved, name):
    with pytest.raises(ValueError, match="must look like family-size.task@1"):
        zoo.load(name, root=saved.parent)


def test_an_unknown_name_suggests_the_nearest(saved):
    with pytest.raises(ValueError, match="no checkpoint is called 'gla-tiny.mqar@2'.*mqar@1"):
        zoo.load("gla-tiny.mqar@2", root=saved.parent)


def test_a_folder_that_is_a_link_is_refused(saved, tmp_path_factory):
    root = tmp_path_factory.mktemp("links")
    (root / NAME).symlink_to(saved, target_is_directory=True)
    _assert_corrupted(root / NAME, "must be a folder and no link")
    with pytest.raises(zoo.CheckpointCorrupted, match="no link"):
        zoo.list(root=root)
    with pytest.raises(zoo.CheckpointCorrupted, match="no link"):
        zoo.save(NAME, _params(), _card(), root=root)


@pytest.mark.parametrize("file", [store.CARD, store.PARAMS])
def test_a_file_that_is_a_link_or_a_pipe_is_refused(saved, file):
    moved = (saved / file).rename(saved / "moved")
    (saved / file).symlink_to(moved)
    _assert_corrupted(saved, f"{file}: must be a file and no link")
    (saved / file).unlink()
    os.mkfifo(saved / file)
    _assert_corrupted(saved, f"{file}: must be a file and no link")


@pytest.mark.parametrize("file", [store.CARD, store.PARAMS])
def test_missing_truncated_and_altered_files_are_refused(saved, file):
    path = saved / file
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        changed = bytearray(data)
        changed[position] ^= 1
        path.write_bytes(changed)
        _assert_corrupted(saved, file)
        path.write_bytes(data[:position])
        _assert_corrupted(saved, file)
    path.unlink()
    _assert_corrupted(saved, f"{file}: is missing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda flat: flat | {"more": X}, "more is there but was never saved"),
        (lambda flat: {n: flat[n] for n in flat if n != "Dense_0/bias"}, "Dense_0/bias is missing"),
        (lambda flat: flat | {"Dense_0/bias": X}, "Dense_0/bias has sha256"),
        (lambda flat: flat | {"../../escape": X}, "../../escape is there but was never saved"),
    ],
)
def test_other_leaves_are_refused(saved, change, message):
    path = saved / store.PARAMS
    flat = store.tensors.loads(path.read_bytes(), path=path)
    path.write_bytes(store.tensors.dumps(change(flat)))
    _assert_corrupted(saved, message)


def _forge(folder: pathlib.Path, flat: dict, **changes) -> None:
    """Writes a checkpoint whose hashes all agree."""
    card = dataclasses.asdict(_card(sha256=digest.digests(flat))) | changes
    text = json.dumps(sealed.seal(card | {"mechanisms": []}, what="card"))
    (folder / store.CARD).write_text(text)
    (folder / store.PARAMS).write_bytes(store.tensors.dumps(flat))


def test_leaf_names_are_keys_and_never_files(saved):
    _forge(saved, {"../../escape": X})
    assert _load(saved)[1][".."][".."]["escape"].shape == X.shape
    assert sorted(os.listdir(saved)) == [store.CARD, store.PARAMS]
    assert os.listdir(saved.parent) == [NAME]


def test_a_leaf_inside_a_leaf_is_refused(saved):
    _forge(saved, {"a": X, "a/b": X})
    _assert_corrupted(saved, "leaf a/b must not lie inside another leaf")


def test_a_card_of_another_checkpoint_is_refused(saved):
    _forge(saved, {"a": X}, name="gla-tiny.mqar@2")
    _assert_corrupted(saved, "is the card of gla-tiny.mqar@2")


def test_a_model_is_looked_up_and_never_imported(saved):
    _forge(saved, {"a": X}, model={"kind": "os.system", "options": {"command": "true"}})
    with pytest.raises(KeyError, match="os.system"):
        _load(saved)


def test_size_is_checked_before_reading(saved):
    with pytest.raises(zoo.CheckpointCorrupted, match="bytes, more than the 100 allowed"):
        zoo.load(NAME, root=saved.parent, max_bytes=100)
    with (saved / store.CARD).open("r+b") as file:
        file.truncate(store.CARD_BYTES + 1)
    _assert_corrupted(saved, "more than the 1048576 allowed")
    with (saved / store.PARAMS).open("r+b") as file:
        file.truncate(1 << 40)  # a sparse file: reading it would not end well


def test_no_pickle_is_ever_read(saved):
    (saved / store.PARAMS).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    _assert_corrupted(saved, "is no safetensors file")
