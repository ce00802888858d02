import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.cross import pointer_network as pointers
from tests import training
from tests.cotangents import like
from tests.initial import initial

KEY = jax.random.key(0)
module = pointers.PointerNetwork(16)


run = jax.jit(pointers.pointer_network)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def arrays(T=4, S=9):
    return draw(2, T, 8, seed=1), draw(2, S, 8, seed=2), 3 * draw(8, seed=3)


@pytest.mark.parametrize("S", [1, 12])
def test_gives_a_distribution_over_any_number_of_inputs(S):
    params = like(jax.eval_shape(module.init, KEY, draw(2, 3, 6), draw(2, 7, 4)))
    p = jax.device_get(jax.jit(module.apply)(params, draw(2, 3, 6), draw(2, S, 4)))
    assert p.shape == (2, 3, S) and (p > 0).all()
    chex.assert_trees_all_close(p.sum(-1), np.ones((2, 3), np.float32), rtol=1e-5)


def test_permuted_inputs_permute_the_distribution():
    (q, k, w), order = arrays(), np.array([3, 0, 8, 1, 7, 2, 4, 6, 5])
    p = jax.device_get(run(q, k, w))
    chex.assert_trees_all_close(run(q, k[:, order], w), p[..., order])


def test_what_is_masked_has_probability_zero():
    q, k, w = arrays()
    seen, kept = np.arange(9)[None] % 3 > 0, [1, 2, 4, 5, 7, 8]

    @jax.jit
    def masked(q, k, w, seen, ids):
        mask = masks.Valid(seen) & masks.Segments(ids)
        return pointers.pointer_network(q, k, w, mask=mask)

    p = jax.device_get(masked(q, k, w, seen, np.zeros((2, 9), np.int32)))
    assert not p[..., ::3].any()
    chex.assert_trees_all_close(p[..., kept], run(q, k[:, kept], w))


def test_refuses_a_mask_for_each_head():
    mask = masks.Dense(jnp.asarray(np.ones((1, 2, 4, 9), bool)))
    with pytest.raises(ValueError, match="mask for 2 heads must be for 1"):
        jax.eval_shape(lambda *x: pointers.pointer_network(*x, mask=mask), *arrays())


def test_decoding_gives_permutations_of_what_is_valid():
    valid = np.stack([np.arange(9) < 9, np.arange(9) % 2 == 0])

    @jax.jit
    def decode(q, k, w, valid):
        def point(t, last, mask):  # even one that forgets its mask
            del last, mask
            return t + 1, pointers.pointer_network(q[:, t][:, None], k, w)[:, 0]

        return pointers.decode_permutation(point, 0, valid)

    found = jax.device_get(decode(*arrays(T=9), valid))
    assert sorted(found[0].tolist()) == list(range(9))
    assert sorted(found[1, :5].tolist()) == [0, 2, 4, 6, 8]
    assert found[1, 5:].tolist() == [-1] * 4


def test_decoding_takes_the_best_choice_that_is_left():
    scores = jnp.asarray(np.float32([[0.1, 0.4, 0.2, 0.3]]))
    seen = []

    def point(state, last, mask):
        jax.debug.callback(lambda *x: seen.append(jax.tree.map(np.asarray, x)), last, mask.keys)
        return state, scores

    decode = lambda valid: pointers.decode_permutation(point, (), valid)
    found = jax.device_get(jax.jit(decode)(np.ones((1, 4), bool)))
    jax.effects_barrier()
    assert found.tolist() == [[1, 3, 2, 0]]
    assert [int(last[0]) for last, _ in seen] == [-1, 1, 3, 2]
    assert [int(left.sum()) for _, left in seen] == [4, 3, 2, 1]


# ---- the claim: learns to put numbers in order, and does so for more numbers than in training ----

START = -0.5


class Sorter(nn.Module):
    """Points from the number that was chosen last to the next larger one."""

    @nn.compact
    def __call__(self, last, values, mask=None):
        encode = lambda x: jnp.concatenate(
            [f(2.0**i * x[..., None]) for i in range(5) for f in (jnp.sin, jnp.cos)], -1
        )
        return pointers.PointerNetwork(64)(encode(last), encode(values), mask=mask)


def numbers(key, batch, S):
    """Numbers, the order they belong in, and what was chosen before each step (teacher-forced)."""
    values = jax.random.uniform(key, (batch, S))
    before = jnp.pad(jnp.sort(values)[:, :-1], ((0, 0), (1, 0)), constant_values=START)
    return values, values.argsort(-1), before


def nll(params, key):
    values, order, before = numbers(key, 64, 6)
    p = Sorter().apply(params, before, values)
    return -jnp.log(jnp.take_along_axis(p, order[..., None], -1)).mean()


def greedy(params, values):
    def point(state, last, mask):
        chosen = jnp.take_along_axis(values, jnp.maximum(last, 0)[:, None], 1)
        last = jnp.where(last[:, None] < 0, START, chosen)
        return state, Sorter().apply(params, last, values, mask=mask)[:, 0]

    return pointers.decode_permutation(point, (), jnp.ones(values.shape, bool))


@functools.partial(jax.jit, static_argnums=1)
def by_teacher_and_alone(params, S):
    """Numbers, their order, what is chosen after the right ones, and what in one go."""
    values, order, before = numbers(jax.random.key(5), 256, S)
    chosen = Sorter().apply(params, before, values).argmax(-1)
    return order, chosen, greedy(params, values) if S == 12 else None


def test_learns_to_sort_more_numbers_than_in_training():
    params = initial(Sorter().init, KEY, jnp.zeros((1, 6)), jnp.zeros((1, 6)))
    params = training.fit(nll, params, steps=300, learning_rate=2e-2)
    for S, least in ((6, 0.8), (8, 0.7), (12, 0.55)):
        order, chosen, found = jax.device_get(by_teacher_and_alone(params, S))
        assert (chosen == order).mean() > least, S
    np.testing.assert_array_equal(np.sort(found), np.tile(np.arange(12), (256, 1)))
    assert (found == order).mean() > 2 / 12  # one that is passed over shifts all after it
