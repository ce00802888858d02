import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import dropout


def kept(rate, seed, b=2, n=4, t=64, s=64):
    index = jnp.ix_(*(jnp.arange(size) for size in (b, n, t, s)))
    return np.asarray(dropout.Dropout(rate, jax.random.key(seed)).keep(*index))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_rate(rate):
    drop = ~kept(rate, 0)
    deviation = np.sqrt(rate * (1 - rate) / drop.size)
    assert abs(drop.mean() - rate) <= 4 * deviation
    for axis in range(4):  # no head, row or column is favoured
        others = tuple(i for i in range(4) if i != axis)
        share = drop.mean(others)
        assert (abs(share - rate) <= 5 * deviation * np.sqrt(drop.shape[axis])).all()


def test_a_part_is_decided_as_in_the_whole():
    d = dropout.Dropout(0.4, jax.random.key(1))
    part = d.keep(
        *jnp.ix_(jnp.array([1]), jnp.array([2, 3]), jnp.arange(7, 20), jnp.arange(30, 64))
    )
    np.testing.assert_array_equal(part, kept(0.4, 1)[1:2, 2:4, 7:20, 30:])


def test_keys_and_neighbours_are_independent():
    a, b = kept(0.5, 0), kept(0.5, 1)
    pairs = [(a, b)] + [(a, np.roll(a, 1, axis)) for axis in range(4)]
    for x, y in pairs:
        assert abs((x == y).mean() - 0.5) < 4 * 0.5 / np.sqrt(x.size)
    np.testing.assert_array_equal(a, kept(0.5, 0))
