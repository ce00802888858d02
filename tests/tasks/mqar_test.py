import itertools

import numpy as np
import pytest

from attnjax.tasks import mqar

TASKS = [
    mqar.Mqar("train"),
    mqar.Mqar("test", vocab_size=34, length=64, num_pairs=16, power_a=1.0),
    mqar.Mqar("test", vocab_size=4097, length=33, num_pairs=3),
]


@pytest.mark.parametrize("task", TASKS)
def test_every_key_comes_twice_and_is_answered_the_second_time(task):
    end = 2 * task.num_pairs
    for example in (task[i] for i in range(100)):
        inputs, targets, weights = (example[name] for name in ("inputs", "targets", "weights"))
        keys, values = inputs[0:end:2], inputs[1:end:2]
        assert len(set(keys)) == len(set(values)) == task.num_pairs
        assert keys.min() >= 1 and keys.max() < task.vocab_size // 2
        assert task.vocab_size // 2 <= values.min() and values.max() < task.vocab_size
        (queries,) = np.nonzero(inputs[end:])
        assert sorted(inputs[end:][queries]) == sorted(keys)
        value_of = dict(zip(keys, values, strict=True))
        expected = np.zeros_like(targets)
        expected[end + queries] = [value_of[key] for key in inputs[end:][queries]]
        np.testing.assert_array_equal(targets, expected)
        np.testing.assert_array_equal(weights, expected != 0)


def test_slots_are_drawn_one_after_the_other_by_the_power_law():
    """For two pairs in three slots all six orders are counted against their probability."""
    task = mqar.Mqar("train", vocab_size=16, length=10, num_pairs=2, power_a=0.5)
    odds = np.array([1, 2**-0.5, 3**-0.5]) / (1 + 2**-0.5 + 3**-0.5)
    orders = list(itertools.permutations(range(3), 2))
    counts = dict.fromkeys(orders, 0)
    n = 6000
    for i in range(n):
        inputs = task[i]["inputs"]
        counts[tuple(int(np.flatnonzero(inputs[4:] == key)[0]) // 2 for key in inputs[0:4:2])] += 1
    for first, second in orders:
        p = odds[first] * odds[second] / (1 - odds[first])
        assert abs(counts[first, second] / n - p) < 4 * np.sqrt(p * (1 - p) / n)


def test_random_non_queries_fills_what_was_empty():
    plain, filled = (mqar.Mqar("train", random_non_queries=on) for on in (False, True))
    fillers = [filled[i]["inputs"][8:][filled[i]["weights"][8:] == 0] for i in range(50)]
    fillers = np.concatenate(fillers)
    assert len(set(fillers)) > 0.8 * len(fillers)  # nearly all different, of 8192
    assert fillers.min() < 400 and fillers.max() > 7800
    assert filled[0]["weights"].sum() == plain[0]["weights"].sum() == 4


@pytest.mark.parametrize("options", [{"num_pairs": 17}, {"num_pairs": 4, "vocab_size": 9}])
def test_too_many_pairs(options):
    with pytest.raises(ValueError, match="num_pairs=.* must be in"):
        mqar.Mqar("train", **options)


def test_baseline():
    assert mqar.baselines() == {"guess_a_shown_value": 0.25}
