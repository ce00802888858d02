"""What holds for every source, and for every generated task whatever it draws."""

import json
import subprocess
import sys

import numpy as np
import pytest

from attnjax.core import registry
from attnjax.tasks import (
    copy,
    icl_regression,
    induction,
    loading,
    lra_listops,
    mqar,
    shapes,
    source,
    source_text,
)

TOKEN_GENERATORS = (mqar.Mqar, copy.Copy, induction.Induction, lra_listops.LraListops)
GENERATED = (*TOKEN_GENERATORS, icl_regression.IclRegression, shapes.Shapes)
TOKENS = (*TOKEN_GENERATORS, source_text.SourceText)

_IN_A_NEW_PROCESS = """
import json, sys
from attnjax.core import registry
names = sys.argv[1:]
sources = {name: registry.get("tasks." + name).fn("test", seed=3) for name in names}
heavy = [name for name in ("tensorflow_datasets", "grain", "sklearn") if name in sys.modules]
print(json.dumps([heavy, {name: [repr(s), s.fingerprint()] for name, s in sources.items()}]))
"""


def same(a: source.Example, b: source.Example) -> bool:
    return loading.batch_hash(a) == loading.batch_hash(b)


def test_another_process_draws_the_same_and_needs_no_extra():
    names = [cls.__module__.rpartition(".")[2] for cls in (*GENERATED, source_text.SourceText)]
    command = [sys.executable, "-c", _IN_A_NEW_PROCESS, *names]
    heavy, there = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    for name in names:
        here = registry.get(f"tasks.{name}").fn("test", seed=3)
        assert there[name] == [repr(here), here.fingerprint()]
    assert heavy == []


@pytest.mark.parametrize("cls", GENERATED)
class TestGenerated:
    def test_random_access_is_free_of_order(self, cls):
        forward = [cls("train")[i] for i in range(6)]
        task = cls("train")
        for i in (5, 0, 3, 3):
            assert same(task[i], forward[i])
        assert not same(forward[0], forward[1])

    def test_splits_and_seeds_differ(self, cls):
        examples = [cls(split)[0] for split in cls.sizes] + [cls("train", seed=1)[0]]
        assert len({loading.batch_hash(example) for example in examples}) == 4

    def test_train_does_not_run_out(self, cls):
        task = cls("train")
        assert len(task) == 2**31 and len(cls("test")) == 3000
        assert not same(task[2**31 - 1], task[2**30 - 1])

    @pytest.mark.parametrize("index", [-1, 3000])
    def test_no_such_index(self, cls, index):
        with pytest.raises(IndexError, match=f"index={index} must be in"):
            cls("test")[index]

    def test_no_such_split_or_seed(self, cls):
        with pytest.raises(ValueError, match="split='dev' must be one of train, validation, test"):
            cls("dev")
        with pytest.raises(ValueError, match="seed=-1 must be"):
            cls("test", seed=-1)

    def test_fingerprint_tells_options_and_examples_apart(self, cls, monkeypatch):
        first = cls("test").fingerprint()
        assert first == cls("test").fingerprint()
        assert len({first, cls("train").fingerprint(), cls("test", seed=1).fingerprint()}) == 3
        monkeypatch.setattr(cls, "version", 2)
        assert cls("test").fingerprint() != first
        monkeypatch.undo()
        draw = cls.draw
        changed = lambda self, rng: draw(self, rng) | {"more": np.zeros(1)}
        monkeypatch.setattr(cls, "draw", changed)
        assert cls("test").fingerprint() != first


def test_random_streams_do_not_overlap():
    """No 64-bit word of 6 examples x 3 splits x 2 seeds comes twice."""

    class Words(source.Generated):
        def draw(self, rng):
            return {"words": rng.integers(2**64, size=500, dtype=np.uint64)}

    drawn = [
        Words(split, seed=seed)[i]["words"]
        for split in Words.sizes
        for seed in (0, 1)
        for i in range(6)
    ]
    assert len(np.unique(drawn)) == 36 * 500


@pytest.mark.parametrize("cls", TOKENS)
def test_token_tasks_agree_on_their_keys(cls):
    example = cls("test")[0]
    dtypes = {name: array.dtype for name, array in example.items()}
    assert dtypes == {"inputs": np.int32, "targets": np.int32, "weights": np.float32}
    assert example["inputs"].shape == example["targets"].shape == example["weights"].shape
    for name in ("inputs", "targets"):
        assert example[name].min() >= 0 and example[name].max() < cls("test").vocab_size


def test_images_scale_integer_pixels_only():
    records = [
        {"image": np.full((2, 3, 1), 255, np.uint8), "label": 4},
        {"image": np.full((2, 3, 1), 0.5, np.float64), "label": np.int64(7)},
    ]
    images = source.Images("all", name="two", num_classes=10, records=records)
    assert repr(images) == "Images(split='all', name='two', num_classes=10)"
    np.testing.assert_array_equal(images[0]["image"], np.ones((2, 3, 1), np.float32), strict=True)
    assert images[1]["image"].dtype == np.float32 and images[1]["image"].max() == 0.5
    assert [(e["label"].item(), e["label"].dtype) for e in images] == [(4, np.int32), (7, np.int32)]


def test_digest_sees_names_dtypes_shapes_and_values():
    x = np.arange(4, dtype=np.int32)
    examples = [
        {"x": x},
        {"y": x},
        {"x": x.astype(np.uint32)},
        {"x": x.reshape(2, 2)},
        {"x": x + 1},
    ]
    assert len({source.digest("", [example]) for example in examples}) == len(examples)
    assert source.digest("", [{"x": x, "y": x}]) == source.digest("", [{"y": x, "x": x}])


def test_cache_dir_is_the_users_unless_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNJAX_DATA", str(tmp_path / "here"))
    assert source.cache_dir() == tmp_path / "here"
    monkeypatch.delenv("ATTNJAX_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert source.cache_dir() == tmp_path / "attnjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert source.cache_dir() == tmp_path / ".cache" / "attnjax"
