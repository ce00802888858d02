import numpy as np
import pytest
from sklearn import datasets

from attnjax.tasks import digits


def test_splits_hold_every_digit_once():
    train, test = digits.digits("train"), digits.digits("test")
    assert (len(train), len(test), train.num_classes) == (1437, 360, 10)
    found = sorted((int(e["label"]), e["image"].tobytes()) for e in (*train, *test))
    known = datasets.load_digits()
    images = (known.images / 16).astype(np.float32)
    assert found == sorted(zip(known.target.tolist(), map(np.ndarray.tobytes, images), strict=True))


def test_an_example():
    example = digits.digits("test")[0]
    assert example["image"].shape == (8, 8, 1) and example["image"].dtype == np.float32
    assert example["image"].min() == 0 and example["image"].max() == 1
    assert example["label"].shape == () and example["label"].dtype == np.int32


def test_classes_keep_their_proportion():
    labels = [int(example["label"]) for example in digits.digits("test")]
    assert set(np.bincount(labels)) <= {35, 36, 37}


def test_seed_is_another_division():
    tests = [digits.digits("test"), digits.digits("test", seed=1)]
    assert tests[0].fingerprint() == digits.digits("test").fingerprint()
    assert tests[0].fingerprint() != tests[1].fingerprint()
    images = [{example["image"].tobytes() for example in test} for test in tests]
    assert 30 < len(images[0] & images[1]) < 120  # 72 by chance


def test_no_such_split():
    with pytest.raises(ValueError, match="split='validation' must be one of train, test"):
        digits.digits("validation")


def test_baselines_are_the_known_ones():
    known = {"svc": 356 / 360, "nearest_3": 355 / 360, "logistic_regression": 348 / 360}
    assert digits.baselines() == pytest.approx(known)
