"""Only what is particular to the Routing Transformer; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks
from attnjax.sparse import routing_transformer as lib
from tests import cost
from tests.sparse import helpers


def normalise(x):
    return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)


def example(T=12, C=4):
    return *helpers.normal(3, 2, T, 3, 8), helpers.normal(3, C, 8, seed=1)


def weights(*args, **options):
    return edit.matrix(lib.routing_transformer, *args, **options)


def test_one_cluster_is_attention_of_normalised_tokens():
    args = example(C=1)
    w = helpers.weights(*map(normalise, args[:2]))
    full = np.einsum("BNTS,BSNV->BTNV", w, args[2])
    actual = helpers.program(lib.routing_transformer, mask=masks.Causal())(*args)
    chex.assert_trees_all_close(actual, full, rtol=1e-5, atol=1e-5)


def test_every_cluster_has_the_same_number_of_tokens():
    """However far most tokens are from it: a token may be in many clusters, or in none."""
    *qkv, centroids = example()
    centroids[:, 1:] = centroids[:, :1]  # the same tokens are best for all
    used = helpers.program(weights, window=3)(*qkv, centroids).sum(-1)
    chex.assert_trees_all_close(used.sum(-1), np.full((2, 3), np.float32(3.0)), rtol=1e-5)
    assert not np.sort(used, -1)[..., :-3].any()


def test_a_causal_mask_hides_later_keys():
    w = helpers.program(weights, window=6, mask=masks.Causal())(*example())
    assert not np.triu(w, 1).any() and np.tril(w, -1).any()


def test_hidden_tokens_take_no_place_in_a_cluster():
    q, k, v, centroids = example()
    q[:, 7], k[:, 7] = centroids[:, 0], centroids[:, 0]  # at the heart of one
    hidden = masks.Valid(jnp.asarray(np.arange(12) != 7)[None].repeat(2, 0))
    attend = lambda *args: lib.routing_transformer(*args, window=3, mask=hidden).at[:, 7].set(0)
    run = helpers.program(attend)
    actual = run(q, k, v, centroids)
    q[:, 7] *= -1
    k[:, 7] *= -1
    chex.assert_trees_all_equal(actual, run(q, k, v, centroids))


def test_a_step_of_gradient_descent_is_the_update_of_the_paper():
    q, k, _, mu = (np.asarray(x, np.float64) for x in example())
    decay, hidden = 0.9, (0, 4)
    Q, K, M = normalise(q), normalise(k), normalise(mu)
    expected = mu.copy()
    for n, c in np.ndindex(3, 4):
        means = []
        for X in (Q, K):
            near = [
                X[b, t, n]
                for b, t in np.ndindex(2, 12)
                if (M[n] @ X[b, t, n]).argmax() == c and (b, t) != hidden
            ]
            assert near
            means.append(np.mean(near, 0))
        expected[n, c] = decay * mu[n, c] + (1 - decay) * (means[0] + means[1]) / 2
    q, k, mu = (x.astype(np.float32) for x in (q, k, mu))
    valid = np.ones((2, 12), bool)
    valid[hidden] = False
    loss = lambda mu, q, k, seen: lib.clustering_loss(q, k, mu, mask=masks.Valid(seen))
    grad = helpers.program(jax.grad(loss))(mu, q, k, valid)
    chex.assert_trees_all_close(mu - (1 - decay) * grad, expected.astype(np.float32), atol=1e-5)


def test_centroids_learn_from_their_own_loss_alone():
    module = lib.RoutingTransformer(num_heads=2, head_dim=8, num_clusters=3)
    x = helpers.normal(2, 9, 16)
    helpers.assert_learns_from_its_own_loss_alone(module, x, "clustering", ["centroids"])


def test_learned_clusters_hold_what_full_attention_looks_at():
    """Tokens of eight kinds, each of which attends to its own kind."""
    kind = np.random.default_rng(0).permutation(np.arange(64) % 8)
    x = 3 * helpers.normal(8, 16, seed=1)[kind] + np.float32(0.5) * helpers.normal(64, 16, seed=2)
    x = x[None, :, None]
    full = helpers.weights(normalise(x), normalise(x), is_causal=False)

    def learn(x, mu):
        """(whether pairs meet in a cluster before, and afterwards)"""
        step = lambda mu, _: (mu - 0.1 * jax.grad(lambda m: lib.clustering_loss(x, x, m))(mu), None)
        both = jnp.stack([mu, jax.lax.scan(step, mu, None, 60)[0]])
        return jax.lax.map(lambda mu: weights(x, x, x, mu, window=8) > 0, both)

    met = helpers.program(learn)(x, helpers.normal(1, 8, 16, seed=3))
    before, after = (np.where(pairs, full, 0).sum(-1).mean() for pairs in met)
    assert after > before + 0.1


def test_cost_grows_with_the_power_one_and_a_half():
    def count(C):
        shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
        args = [shape(1, C**2, 1, 32)] * 3 + [shape(1, C, 32)]
        loss = lambda *x: lib.routing_transformer(*x).sum()
        return cost.operations(jax.grad(loss, (0, 1, 2)), *args)

    assert 7 < count(64) / count(32) < 8.5  # of four times the tokens; 16 for full attention


def test_refuses_what_it_cannot_do():
    args = [jnp.asarray(x) for x in example()]
    mask = masks.Dense(jnp.ones((1, 1, 12, 12), bool))
    with pytest.raises(NotImplementedError, match="routing_transformer can't honour Dense"):
        lib.routing_transformer(*args, mask=mask)
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        functools.partial(lib.routing_transformer, window=0)(*args)
