"""Neural attention: a choice among keys that no product makes, and what a network may not do."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks
from attnjax.higher_order import neural_attention as lib
from attnjax.ops import dot_product_attention as ops
from tests import cost, training

KEY = jax.random.key(0)


def test_scores_by_distance():
    """With P = 2 features x, -x the paper's network is |q - k|, by hand."""
    q, k = jax.random.normal(KEY, (2, 2, 5, 3, 1))
    v = jax.random.normal(jax.random.key(1), (2, 5, 3, 4))
    w1 = jnp.array([[1.0, -1.0], [0, 0], [-1, 1], [0, 0]])  # relu(q - k) and relu(k - q)
    network = w1, jnp.zeros(2), jnp.ones((2, 1)), jnp.zeros(1), jnp.array([-3.0])
    both = lambda x: jnp.concatenate([x, -x], -1)
    actual = jax.jit(lib.neural_attention)(both(q), both(k), v, *network)
    distance = jnp.abs(q[:, :, None] - k[:, None])[..., 0]  # B T S N
    expected = jnp.einsum("BTSN,BSNV->BTNV", jax.nn.softmax(-3 * distance, 2), v)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def nearest(key, S=9):
    """One query and S keys, all of them numbers, and which key is nearest to the query."""
    x = jax.random.uniform(key, (64, S + 1, 1, 1), minval=-1.0)
    q, k = x[:, :1], x[:, 1:]
    return q, k, jnp.abs(q - k)[:, :, 0, 0].argmin(-1)


def accuracy_after_training(attend, params):
    """How often the heaviest key is the nearest, after learning that it shall be."""

    def weights(params, q, k):
        S = k.shape[1]
        v = jnp.broadcast_to(jnp.eye(S)[None, :, None], (64, S, 1, S))
        return attend(params, q, k, v)[:, 0, 0]

    def loss(params, key):
        q, k, best = nearest(key)
        return -jnp.log(jnp.take_along_axis(weights(params, q, k), best[:, None], 1) + 1e-6).mean()

    params = training.fit(loss, params, steps=300, learning_rate=0.03)
    q, k, best = nearest(jax.random.key(1))
    return (jax.jit(weights)(params, q, k).argmax(-1) == best).mean()


def test_learns_to_choose_the_nearest_key():
    """The headline, in small: a product rises or falls with the key, and so picks the outermost."""
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(KEY, i), shape) / shape[0] ** 0.5
    network = draw(0, 2, 16), jnp.zeros(16), draw(1, 16, 8), jnp.zeros(8), draw(2, 8)
    neural = lambda network, q, k, v: lib.neural_attention(q, k, v, *network)
    affine = lambda a, x: x * a[0] + a[1]
    product = lambda a, q, k, v: ops.dot_product_attention(affine(a[0], q), affine(a[1], k), v)
    assert accuracy_after_training(neural, network) > 0.8
    assert accuracy_after_training(product, jnp.ones((2, 2))) < 0.5


def test_network_that_ignores_the_key_gives_the_mean_of_what_is_seen():
    args = lib.SPEC.example(KEY, 9)
    args["w1"] = args["w1"].at[4:].set(0)  # the rows of the key
    mean = jnp.cumsum(args["v"], 1) / jnp.arange(1, 10)[None, :, None, None]
    causal = jax.jit(lambda: lib.neural_attention(**args, mask=masks.Causal()))()
    chex.assert_trees_all_close(causal, mean, rtol=1e-5, atol=1e-5)


def test_many_queries_give_what_each_gives_alone():
    """More than are scored at once, with a rest."""
    args = lib.SPEC.example(KEY, 130)
    alone = lambda t: lib.neural_attention(
        **(args | dict(q=args["q"][:, t : t + 1])), mask=masks.Causal(), q_offset=t
    )
    whole = jax.jit(lambda: lib.neural_attention(**args, mask=masks.Causal()))()
    for t in (0, 63, 64, 129):
        chex.assert_trees_all_close(whole[:, t], alone(t)[:, 0], rtol=1e-5, atol=1e-5)


def test_no_array_of_all_pairs_is_held():
    args = jax.eval_shape(lambda: lib.SPEC.example(KEY, 1024))
    grad = jax.grad(lambda args: lib.neural_attention(**args).sum())
    pairs = 2 * 3 * 6 * 1024**2  # B N F T S
    assert cost.largest_array(grad, args) <= pairs / 16


def test_arguments_that_do_not_fit():
    args = lib.SPEC.example(KEY, 3)
    with pytest.raises(ValueError, match=r"w1 \(7, 6\) must have 2 \* P=4 rows"):
        lib.neural_attention(**(args | dict(w1=jnp.ones((7, 6)))))
    with pytest.raises(ValueError, match="reduced_dim=1 must be at least 2"):
        lib.NeuralAttention(2, 4, reduced_dim=1).init(KEY, jnp.ones((1, 3, 8)))
