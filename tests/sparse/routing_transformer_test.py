"""Only what is particular to the Routing Transformer; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import routing_transformer as lib
from tests import cost

KEY = jax.random.key(0)


def normalise(x):
    return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)


def example(T=12, C=4):
    args = lib.SPEC.example(KEY, T)
    return [args[name] for name in ("q", "k", "v")] + [args["centroids"][:, :C]]


def test_one_cluster_is_attention_of_normalised_tokens():
    q, k, v, centroids = example(C=1)
    full = ops.dot_product_attention(normalise(q), normalise(k), v, mask=masks.Causal())
    actual = lib.routing_transformer(q, k, v, centroids, mask=masks.Causal())
    chex.assert_trees_all_close(actual, full, rtol=1e-5, atol=1e-5)


def test_every_cluster_has_the_same_number_of_tokens():
    """However far most tokens are from it: a token may be in many clusters, or in none."""
    *qkv, centroids = example()
    centroids = centroids.at[:, 1:].set(centroids[:, :1])  # the same tokens are best for all
    w = edit.matrix(lib.routing_transformer, *qkv, centroids, window=3)
    used = w.sum(-1)
    chex.assert_trees_all_close(used.sum(-1), jnp.full((2, 3), 3.0), rtol=1e-5)
    chex.assert_trees_all_close(jnp.sort(used, -1)[..., :-3], jnp.zeros((2, 3, 9)))


def test_a_causal_mask_hides_later_keys():
    *qkv, centroids = example()
    w = edit.matrix(lib.routing_transformer, *qkv, centroids, window=6, mask=masks.Causal())
    assert not np.triu(w, 1).any() and np.tril(w, -1).any()


def test_hidden_tokens_take_no_place_in_a_cluster():
    q, k, v, centroids = example()
    q, k = (x.at[:, 7].set(centroids[:, 0][None]) for x in (q, k))  # at the heart of one
    hidden = masks.Valid(jnp.ones((2, 12), bool).at[:, 7].set(False))
    run = functools.partial(lib.routing_transformer, window=3, mask=hidden)
    actual = run(q, k, v, centroids).at[:, 7].set(0)
    other = run(q.at[:, 7].multiply(-1), k.at[:, 7].multiply(-1), v, centroids).at[:, 7].set(0)
    chex.assert_trees_all_equal(actual, other)


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
    q, k, mu = (jnp.asarray(x, jnp.float32) for x in (q, k, mu))
    mask = masks.Valid(jnp.ones((2, 12), bool).at[hidden].set(False))
    grad = jax.jit(jax.grad(lambda mu: lib.clustering_loss(q, k, mu, mask=mask)))(mu)
    chex.assert_trees_all_close(mu - (1 - decay) * grad, expected.astype(np.float32), atol=1e-5)


def test_centroids_learn_from_their_own_loss_alone():
    x = jax.random.normal(KEY, (2, 9, 16))
    options = dict(num_heads=2, head_dim=8, num_clusters=3)
    modules = [lib.RoutingTransformer(**options, clustering=w) for w in (0.0, 1.0, 2.0)]

    @jax.jit
    def grads():
        params = modules[0].init(KEY, x)
        return [jax.grad(lambda p, m=m: (m.apply(p, x) ** 2).sum())(params) for m in modules]

    none, once, twice = (g["params"] for g in grads())
    a, b, c = (g.pop("centroids")["table"] for g in (none, once, twice))
    assert not a.any() and b.any()
    chex.assert_trees_all_close(c, 2 * b, rtol=1e-6)
    chex.assert_trees_all_equal(none, once)


def test_learned_clusters_hold_what_full_attention_looks_at():
    """Tokens of eight kinds, each of which attends to its own kind."""
    kind = jax.random.permutation(KEY, jnp.repeat(jnp.arange(8), 8))
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(KEY, i), shape)
    x = (3 * draw(1, 8, 16)[kind] + 0.5 * draw(2, 64, 16))[None, :, None]
    full = jax.nn.softmax(jnp.einsum("BTNH,BSNH->BNTS", normalise(x), normalise(x)) / 4)

    def mass(mu):
        """Of the weights of full attention, on pairs that meet in a cluster."""
        met = edit.matrix(lib.routing_transformer, x, x, x, mu, window=8) > 0
        return jnp.where(met, full, 0).sum(-1).mean()

    @jax.jit
    def run():
        mu = draw(3, 1, 8, 16)
        step = lambda mu, _: (mu - 0.1 * jax.grad(lambda m: lib.clustering_loss(x, x, m))(mu), None)
        return mass(mu), mass(jax.lax.scan(step, mu, None, 60)[0])

    before, after = run()
    assert after > before + 0.1


def test_cost_grows_with_the_power_one_and_a_half():
    def count(C):
        shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
        args = [shape(1, C**2, 1, 32)] * 3 + [shape(1, C, 32)]
        loss = lambda *x: lib.routing_transformer(*x).sum()
        return cost.operations(jax.grad(loss, (0, 1, 2)), *args)

    assert 7 < count(64) / count(32) < 8.5  # of four times the tokens; 16 for full attention


def test_refuses_what_it_cannot_do():
    args = example()
    mask = masks.Dense(jnp.ones((1, 1, 12, 12), bool))
    with pytest.raises(NotImplementedError, match="routing_transformer can't honour Dense"):
        lib.routing_transformer(*args, mask=mask)
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        functools.partial(lib.routing_transformer, window=0)(*args)
