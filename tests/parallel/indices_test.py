import jax
import jax.numpy as jnp

from attnjax.ops import dropout
from attnjax.parallel import indices


def test_a_piece_keeps_what_the_whole_keeps():
    drop = dropout.Dropout(0.4, jax.random.key(0))
    grid = lambda *sizes: jnp.ix_(*map(jnp.arange, sizes))
    once = indices.shifted(dict(dropout=drop, rest=1), batch=2)
    twice = indices.shifted(once, head=jnp.int32(3))
    keep = lambda: (drop.keep(*grid(4, 6, 5, 5)), twice["dropout"].keep(*grid(2, 3, 5, 5)))
    whole, piece = jax.device_get(jax.jit(keep)())
    assert twice["rest"] == 1 and (piece == whole[2:, 3:]).all() and not whole.all()


def test_a_score_is_told_its_own_indices():
    mod = indices.shifted(dict(score_mod=lambda x, *at: at), batch=2, head=3)["score_mod"]
    assert mod(0.0, 1, 1, 5, 6) == (3, 4, 5, 6)
