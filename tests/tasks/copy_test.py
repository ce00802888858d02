import numpy as np
import pytest

from attnjax.tasks import copy


@pytest.mark.parametrize("variant", ["plain", "selective"])
def test_content_is_asked_for_in_its_order(variant):
    task = copy.Copy("train", variant=variant, vocab_size=6, length=12, num_tokens=5)
    for example in (task[i] for i in range(50)):
        inputs, targets = example["inputs"], example["targets"]
        assert inputs.shape == (17,)
        content = inputs[inputs > 1]
        np.testing.assert_array_equal(content, targets[-5:])
        np.testing.assert_array_equal(inputs[-5:], 1)
        assert np.count_nonzero(inputs[:12] == 0) == 7
        np.testing.assert_array_equal(targets[:12], 0)
        np.testing.assert_array_equal(example["weights"], [0] * 12 + [1] * 5)


def test_places_are_fixed_in_plain_and_everywhere_in_selective():
    places = {}
    for variant in ("plain", "selective"):
        task = copy.Copy("train", variant=variant, length=12, num_tokens=3)
        places[variant] = {tuple(np.flatnonzero(task[i]["inputs"][:12])) for i in range(200)}
    assert places["plain"] == {(0, 1, 2)}
    assert len(places["selective"]) > 100
    assert set(sum(places["selective"], ())) == set(range(12))


def test_all_contents_occur():
    task = copy.Copy("train", vocab_size=5)
    assert set(np.concatenate([task[i]["targets"][-16:] for i in range(10)])) == {2, 3, 4}


@pytest.mark.parametrize("options", [{"vocab_size": 3}, {"num_tokens": 65}, {"num_tokens": 0}])
def test_impossible_sizes(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}=.* must be"):
        copy.Copy("train", **options)


def test_baseline():
    assert copy.baselines() == {"guess": 1 / 16}
