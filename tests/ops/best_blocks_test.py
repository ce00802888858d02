import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import best_blocks as lib

KEY = jax.random.key(0)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_are_the_earlier_blocks_of_highest_score_of_each_query_and_head(own, count):
    q = jax.random.normal(KEY, (2, 130, 4, 8))  # more than one chunk
    keys = jax.random.normal(jax.random.key(1), (2, 5, 2, 8))
    usable, at = jnp.ones((2, 5), bool).at[0, 1].set(False), jnp.arange(130) // 26
    chosen = lib.best_blocks(q, keys, usable, at, count=count, own=own)
    assert chosen.shape == (2, 130, 4, min(count, 5))
    score = np.einsum("btnh,blnh->btnl", q, np.repeat(keys, 2, 2))
    for b, t, n in np.ndindex(*chosen.shape[:3]):
        past = [i for i in range(at[t]) if usable[b, i]]
        best = own * [int(at[t])] + sorted(past, key=lambda i: -score[b, t, n, i])
        found = chosen[b, t, n].tolist()
        assert found[: len(best)] == best[:count] and len(set(found)) == len(found)


def test_has_no_gradient():
    q, keys = jnp.ones((1, 2, 1, 2)), jnp.ones((1, 3, 1, 2))
    usable, at = jnp.ones((1, 3), bool), jnp.arange(2)

    def loss(q, keys):
        return lib.best_blocks(q, keys, usable, at, count=2, own=True).sum() * q.sum()

    assert not jax.grad(loss, 1)(q, keys).any()
