import pathlib
import sysconfig

import numpy as np
import pytest

from attnjax.tasks import source_text

SPLITS = ("train", "validation", "test")


def test_windows_predict_every_byte_but_the_first_once():
    text = source_text.SourceText("test", length=100)
    corpus = text._corpus()
    examples = list(text)
    n = 100 * len(text)
    assert 0 <= len(corpus) - 1 - n < 100
    inputs, targets, weights = (
        np.concatenate([example[name] for example in examples])
        for name in ("inputs", "targets", "weights")
    )
    np.testing.assert_array_equal(inputs, corpus[:n])
    np.testing.assert_array_equal(targets, corpus[1 : n + 1])
    assert (weights == 1).all()


def test_splits_hold_every_file_once():
    files = {split: bytes(source_text.SourceText(split)._corpus()).split(b"\0") for split in SPLITS}
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    known = [(root / path).read_bytes() for path in source_text._files(root)]
    assert sorted(sum(files.values(), [])) == sorted(known)
    assert (root / "argparse.py").read_bytes() in known
    assert not any("test" in pathlib.Path(path).parts for path in source_text._files(root))
    shares = [len(files[split]) / len(known) for split in SPLITS]
    np.testing.assert_allclose(shares, [0.9, 0.05, 0.05], atol=0.03)
    assert len(known) > 300


def test_seed_moves_files_and_the_fingerprint_tells():
    base, other = source_text.SourceText("test"), source_text.SourceText("test", seed=1)
    assert not np.array_equal(base._corpus(), other._corpus())
    prints = [
        base,
        other,
        source_text.SourceText("test", length=128),
        source_text.SourceText("train"),
    ]
    assert len({text.fingerprint() for text in prints}) == 4
    assert base.fingerprint() == source_text.SourceText("test").fingerprint()


def test_fingerprint_is_of_every_byte(monkeypatch):
    text = source_text.SourceText("test")
    before, corpus = text.fingerprint(), text._corpus().copy()
    corpus[len(corpus) // 3] ^= 1
    monkeypatch.setattr(source_text, "_corpus", lambda split, seed: corpus)
    assert text.fingerprint() != before


def test_wrong_arguments(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="split='dev' must be one of train, validation, test"):
        source_text.SourceText("dev")
    with pytest.raises(ValueError, match="length=0 must be in"):
        source_text.SourceText("test", length=0)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="has no sources in"):
        source_text.SourceText("test", seed=12345)


def test_baselines_are_ordered():
    numbers = source_text.baselines()
    assert 1 < numbers["lzma_bits_per_byte"] < numbers["unigram_bits_per_byte"] < 6
    train, test = (source_text.SourceText(split)._corpus() for split in ("train", "test"))
    p = np.bincount(train, minlength=256) / len(train)
    q = np.bincount(test, minlength=256) / len(test)
    entropy = -np.sum(q[q > 0] * np.log2(q[q > 0]))  # no code is shorter than its own entropy
    cross = -np.sum(q[p > 0] * np.log2(p[p > 0]))
    assert entropy < numbers["unigram_bits_per_byte"]
    assert np.isclose(numbers["unigram_bits_per_byte"], cross, atol=1e-3)
