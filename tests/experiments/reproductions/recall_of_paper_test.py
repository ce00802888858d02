import collections
import functools

import jax
import numpy as np
import pytest

from experiments.reproductions import recall_of_paper

SIZES = dict(length=32, vocab_size=32, num_pairs=4, power_a=0.01)


@pytest.fixture(scope="module")
def drawn():
    draw = functools.partial(recall_of_paper.draw, batch_size=2000, **SIZES)
    return jax.device_get(jax.jit(draw)(jax.random.key(0)))


def test_every_key_stands_again_where_its_value_is_asked(drawn):
    for tokens, at, values in zip(*(x[:64] for x in drawn), strict=True):
        keys = tokens[0:8:2]
        assert (tokens[1:8:2] == values).all() and (tokens[at] == keys).all()
        assert len({*keys}) == len({*values}) == len({*at}) == 4
        assert keys.min() >= 1 and keys.max() < 16 and values.min() >= 16 and values.max() < 32
        assert (at >= 8).all() and (at % 2 == 0).all()
        assert (np.delete(tokens[8:], at - 8) == 0).all()


def test_near_questions_are_more_frequent(drawn):
    _, at, _ = drawn
    assert (at[:, 0] == 8).mean() > 3 * (at[:, 0] == 16).mean() > 0


def test_distinct_numbers_are_drawn_alike():
    draw = jax.jit(jax.vmap(lambda key: recall_of_paper.distinct(key, 5, 3)))
    drawn = draw(jax.random.split(jax.random.key(0), 60_000))
    count = collections.Counter(map(tuple, drawn.tolist()))
    assert len(count) == 5 * 4 * 3 and all(len({*numbers}) == 3 for numbers in count)
    assert min(count.values()) > 850 and max(count.values()) < 1150  # 1000 on average, 32 is usual
