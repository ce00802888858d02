import collections
import dataclasses

import numpy as np
import pytest

from attnjax.tasks import lra_listops

SMALL = dict(length=40, min_length=6, max_depth=3, max_args=4)


def parse(tokens):
    """(value, depth, most arguments) of the expression that `tokens`, a deque, begin with."""
    token = tokens.popleft()
    if token < lra_listops.OPERATOR:
        return token - lra_listops.DIGIT, 0, 0
    values, depths, counts = [], [], []
    while tokens[0] != lra_listops.CLOSE:
        value, depth, count = parse(tokens)
        values, depths, counts = [*values, value], [*depths, depth], [*counts, count]
    tokens.popleft()
    x = np.array(values)
    results = [x.min(), x.max(), np.floor(np.median(x)), x.sum() % 10]
    value = int(results[token - lra_listops.OPERATOR])
    return value, 1 + max(depths), max(len(values), *counts)


@pytest.mark.parametrize("options", [SMALL, {}])
def test_the_answer_is_the_value_of_the_expression(options):
    task = lra_listops.LraListops("train", **options)
    depths, counts, lengths = set(), set(), []
    for i in range(150 if options else 3):
        example = task[i]
        (at,) = np.flatnonzero(example["weights"])
        assert not example["inputs"][at + 1 :].any() and example["weights"][at] == 1
        tokens = collections.deque(example["inputs"][: at + 1].tolist())
        value, depth, count = parse(tokens)
        assert not tokens
        assert example["targets"][at] == lra_listops.DIGIT + value
        assert np.count_nonzero(example["targets"]) == 1
        depths, counts, lengths = depths | {depth}, counts | {count}, [*lengths, at + 1]
    assert max(depths) <= task.max_depth and max(counts) <= task.max_args
    assert task.min_length <= min(lengths) and max(lengths) <= task.length
    if options:
        assert depths == {1, 2, 3} and max(counts) == 4 and len(set(lengths)) > 10


def test_every_operator_and_digit_comes():
    task = lra_listops.LraListops("test", **SMALL)
    seen = {int(token) for i in range(100) for token in task[i]["inputs"]}
    assert seen == set(range(task.vocab_size))


def test_a_quarter_of_the_arguments_are_expressions():
    task = lra_listops.LraListops("train", length=200, min_length=1, max_depth=2, max_args=3)
    first = np.array([task[i]["inputs"][1] for i in range(2000)])
    share = (first >= lra_listops.OPERATOR).mean()
    assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 2000)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(max_depth=0), "max_depth=0 must be at least 1"),
        (dict(max_args=1), "max_args=1 must be at least 2"),
        (dict(length=3, min_length=1), "length=3 must be at least 4"),
        (dict(min_length=41), "min_length=41 must be at most length=40"),
    ],
)
def test_impossible_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        lra_listops.LraListops("train", **SMALL | change)


def test_lengths_that_are_never_drawn_are_an_error_and_no_endless_loop(monkeypatch):
    monkeypatch.setattr(lra_listops, "_TRIES", 50)
    task = lra_listops.LraListops("train", **SMALL | dict(max_depth=1, min_length=20))
    with pytest.raises(ValueError, match="50 draws of .*min_length=20.* gave no expression"):
        task[0]


def test_the_vocabulary_is_no_option():
    names = {field.name for field in dataclasses.fields(lra_listops.LraListops)}
    assert "vocab_size" not in names


def test_baseline():
    assert lra_listops.baselines() == {"guess": 0.1}
