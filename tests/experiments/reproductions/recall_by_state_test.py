import jax
import numpy as np

from experiments.reproductions import recall_by_state


def test_every_key_comes_again_and_its_value_is_the_target():
    options = dict(batch_size=8, length=20, vocab_size=32)
    rows = recall_by_state.draw(jax.random.key(0), **options)
    for tokens, targets, weights in zip(*map(np.asarray, rows), strict=True):
        value = dict(zip(tokens[0:10:2], tokens[1:10:2], strict=True))
        assert len(value) == 5 and len({*value.values()}) == 5
        assert min(value) >= 1 and max(value) < 16 and min(value.values()) >= 16
        assert sorted(tokens[10::2]) == sorted(value) and (tokens[11::2] == 0).all()
        assert [value[key] for key in tokens[10::2]] == list(targets[10::2])
        assert (weights == (targets > 0)).all() and weights.sum() == 5


def test_the_order_of_questions_is_drawn():
    tokens, *_ = recall_by_state.draw(jax.random.key(0), batch_size=64, length=32, vocab_size=64)
    assert (tokens[:, 0:16:2] != tokens[:, 16::2]).any(1).all()
