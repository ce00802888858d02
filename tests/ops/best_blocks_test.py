import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import best_blocks as lib


@pytest.mark.parametrize(("count", "own"), [(1, True), (3, True), (3, False), (9, False)])
def test_are_the_earlier_blocks_of_highest_score_of_each_query_and_head(count, own):
    draw = np.random.default_rng(0).standard_normal
    q, keys = draw((2, 130, 4, 8), "f4"), draw((2, 5, 2, 8), "f4")  # more than one chunk
    usable, at = np.arange(10).reshape(2, 5) != 1, np.arange(130) // 26
    choose = jax.jit(functools.partial(lib.best_blocks, count=count, own=own))
    chosen = np.asarray(choose(q, keys, usable, at))
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

    assert not np.any(jax.jit(jax.grad(loss, 1))(q, keys))
