import functools

import jax

from experiments.reproductions import copy_state


def draw(**options):
    return jax.device_get(jax.jit(functools.partial(copy_state.draw, **options))(jax.random.key(0)))


def test_a_string_stands_again_behind_a_sign():
    options = dict(batch_size=8, length=5, vocab_size=7)
    tokens, targets, weights = draw(**options)
    string = tokens[:, :5]
    assert tokens.shape == (8, 10) and string.min() > 0 and string.max() < 7
    assert (tokens[:, 5] == 0).all() and (tokens[:, 6:] == string[:, :-1]).all()
    assert (targets[:, 5:] == string).all()
    assert (weights[:, :5] == 0).all() and (weights[:, 5:] == 1).all()


def test_strings_differ():
    tokens, *_ = draw(batch_size=64, length=16, vocab_size=16)
    assert len({tuple(row) for row in tokens[:, :16].tolist()}) == 64
    assert set(tokens[:, :16].ravel().tolist()) == set(range(1, 16))
