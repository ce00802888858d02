"""Only what is particular to Sparsifiner; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks
from attnjax.sparse import sparsifiner as lib
from tests.sparse import helpers


def example(T=12):
    gates, up = helpers.normal(2, 8, 4, seed=1), helpers.normal(5, T, seed=2)
    down = helpers.normal(T, 5, seed=3) / np.float32(T**0.5)
    return [*helpers.normal(3, 2, T, 3, 8), *gates, down, up]


def weights(*args, **options):
    return edit.matrix(lib.sparsifiner, *args, **options)


def of_valid(valid, *args):
    return weights(*args, topk=4, mask=masks.Valid(valid))


@pytest.mark.parametrize("topk", [12, 99])
def test_all_keys_are_full_attention(topk):
    args = example()
    w = helpers.weights(*args[:2], is_causal=False)
    actual = helpers.program(lib.sparsifiner, topk=topk)(*args)
    full = np.einsum("BNTS,BSNV->BTNV", w, args[2])
    chex.assert_trees_all_close(actual, full, rtol=1e-5, atol=1e-6)


def test_each_query_sees_as_many_keys_and_others_in_another_image():
    w = helpers.program(of_valid)(np.ones((2, 12), bool), *example())
    assert ((w > 0).sum(-1) == 4).all() and not ((w[0] > 0) == (w[1] > 0)).all()
    chex.assert_trees_all_close(w.sum(-1), np.ones_like(w[..., 0]), rtol=1e-5)


def test_a_guess_without_reduction_is_the_map_itself():
    """One pattern for each key, and gates that leave q and k as they are: the true best keys."""
    q, k, v, *_ = example()
    eye = [np.eye(n, dtype=np.float32) for n in (8, 8, 12, 12)]

    def both(*args):
        loss = lib.reconstruction_loss(*args[:2], *args[3:])
        return weights(*args, topk=4) > 0, loss

    chosen, loss = helpers.program(both)(q, k, v, *eye)
    x = np.einsum("BTNH,BSNH->BNTS", q, k)
    best = x >= np.sort(x, -1)[..., -4:-3]
    chex.assert_trees_all_equal(chosen, best)
    chex.assert_trees_all_close(loss, np.float32(0.0), atol=1e-10)


def test_the_loss_is_the_distance_of_the_guess_to_the_map():
    """Where all patterns are the same, the guess is that pattern."""
    q, k, _, *gates, down, _ = example()
    up = np.linspace(0, 1, 12, dtype=np.float32)[None].repeat(5, 0)
    valid = np.ones((2, 12), bool)
    valid[0, 3] = False
    w = np.where(valid[:, None, None], helpers.weights(q, k, is_causal=False), 0)
    w = w / w.sum(-1, keepdims=True)
    square = np.where(valid[:, None, None], (w - up[0]) ** 2, 0)
    loss = lambda valid, *args: lib.reconstruction_loss(*args, mask=masks.Valid(valid))
    actual = helpers.program(loss)(valid, q, k, *gates, down, up)
    chex.assert_trees_all_close(actual, np.float32(square.sum() / (2 * 12 * 3)), rtol=1e-5)


def test_the_guess_learns_from_its_own_loss_alone():
    options = dict(num_heads=2, head_dim=8, length=9, topk=3, patterns=4, gate_dim=4)
    tables = "gate_query", "gate_key", "down", "up"
    args = lib.Sparsifiner(**options), helpers.normal(2, 9, 16), "reconstruct", tables
    helpers.assert_learns_from_its_own_loss_alone(*args)


def test_a_learned_guess_finds_where_attention_looks():
    """Maps that depend on the content of an image: tokens look at those of their own kind."""
    kinds = np.random.default_rng(0).integers(0, 3, (16, 12))
    q = 5 * helpers.one_hot(kinds, 8)[:, :, None] + np.float32(0.3) * helpers.normal(16, 12, 1, 8)
    full = helpers.weights(q, q, is_causal=False)

    def learn(q, learned):
        """(what is seen before, and afterwards)"""
        loss = lambda x: lib.reconstruction_loss(q, q, *x)
        step = lambda x, _: (jax.tree.map(lambda x, g: x - 0.3 * g, x, jax.grad(loss)(x)), None)
        after, _ = jax.lax.scan(step, learned, None, 400)
        both = jax.tree.map(lambda *x: jnp.stack(x), learned, after)
        return jax.lax.map(lambda learned: weights(q, q, q, *learned, topk=4) > 0, both)

    learned = [np.float32(0.3) * helpers.normal(n, n, seed=i) for i, n in enumerate((8, 8, 12, 12))]
    seen = helpers.program(learn)(q, learned)
    before, after = (np.where(x, full, 0).sum(-1).mean() for x in seen)
    assert after > before + 0.1


def test_hidden_keys_are_not_chosen():
    valid = ~np.isin(np.arange(12), [1, 5])[None].repeat(2, 0)
    q, k, *rest = example()
    run = helpers.program(of_valid)
    w = run(valid, q, k, *rest)
    assert ((w > 0).sum(-1) == 4).all() and not w[..., [1, 5]].any()
    other = np.where(valid[..., None, None], k, np.float32(50.0))
    chex.assert_trees_all_equal(run(valid, q, other, *rest), w)


def test_refuses_what_it_cannot_do():
    args = [jnp.asarray(x) for x in example()]
    with pytest.raises(NotImplementedError, match="sparsifiner can't honour Causal"):
        lib.sparsifiner(*args, mask=masks.Causal())
    with pytest.raises(ValueError, match="topk=0 must be at least 1"):
        functools.partial(lib.sparsifiner, topk=0)(*args)
    with pytest.raises(ValueError, match="T=7 must be at most length=6"):
        lib.Sparsifiner(num_heads=1, head_dim=4, length=6).init(helpers.KEY, jnp.zeros((1, 7, 8)))
