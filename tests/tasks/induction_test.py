import numpy as np
import pytest

from attnjax.tasks import induction


def test_the_answer_follows_the_only_other_trigger():
    task = induction.Induction("train", vocab_size=5, length=9)
    firsts = set()
    for example in (task[i] for i in range(200)):
        first, last = np.flatnonzero(example["inputs"] == 0)
        assert last == 8
        answer = example["inputs"][first + 1]
        np.testing.assert_array_equal(example["targets"], [0] * 8 + [answer])
        np.testing.assert_array_equal(example["weights"], [0] * 8 + [1])
        firsts.add(int(first))
    assert firsts == set(range(7))


@pytest.mark.parametrize("name", ["vocab_size", "length"])
def test_impossible_sizes(name):
    with pytest.raises(ValueError, match=f"{name}=2 must be at least 3"):
        induction.Induction("train", **{name: 2})


def test_baseline():
    assert induction.baselines() == {"guess": 1 / 15}
