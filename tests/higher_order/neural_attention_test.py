"""Neural attention: a choice among keys that no product makes, and what a network may not do."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.higher_order import neural_attention as lib
from attnjax.ops import dot_product_attention as ops
from tests import cost, training

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def example(T):
    return jax.device_get(jax.jit(lib.SPEC.example, static_argnums=1)(KEY, T))


def test_scores_by_distance():
    """With P = 2 features x, -x the paper's network is |q - k|, by hand."""
    q, k = normal(2, 2, 5, 3, 1)
    v = normal(2, 5, 3, 4, seed=1)
    w1 = np.float32([[1, -1], [0, 0], [-1, 1], [0, 0]])  # relu(q - k) and relu(k - q)
    zeros, ones = lambda *shape: np.zeros(shape, np.float32), np.ones((2, 1), np.float32)
    network = w1, zeros(2), ones, zeros(1), np.float32([-3])
    both = lambda x: np.concatenate([x, -x], -1)
    actual = jax.jit(lib.neural_attention)(both(q), both(k), v, *network)
    e = np.exp(-3 * np.abs(q[:, :, None] - k[:, None])[..., 0])  # B T S N
    expected = np.einsum("BTSN,BSNV->BTNV", e / e.sum(2, keepdims=True), v)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def nearest(key, S=9):
    """One query and S keys, all of them numbers, and which key is nearest to the query."""
    x = jax.random.uniform(key, (64, S + 1, 1, 1), minval=-1.0)
    q, k = x[:, :1], x[:, 1:]
    return q, k, jnp.abs(q - k)[:, :, 0, 0].argmin(-1)


def weights(attend, params, q, k):
    S = k.shape[1]
    v = jnp.broadcast_to(jnp.eye(S)[None, :, None], (64, S, 1, S))
    return attend(params, q, k, v)[:, 0, 0]


def losses(params, key):
    """That the heaviest key be the nearest, of a network and of a product, and how often it is."""
    q, k, best = nearest(key)
    affine = lambda a, x: x * a[0] + a[1]
    neural = lambda network, q, k, v: lib.neural_attention(q, k, v, *network)
    product = lambda a, q, k, v: ops.dot_product_attention(affine(a[0], q), affine(a[1], k), v)
    ws = [weights(fn, p, q, k) for fn, p in zip((neural, product), params, strict=True)]
    right = lambda w: jnp.take_along_axis(w, best[:, None], 1)
    loss = sum(-jnp.log(right(w) + 1e-6).mean() for w in ws)
    return loss, [(w.argmax(-1) == best).mean() for w in ws]


def test_learns_to_choose_the_nearest_key():
    """The headline, in small: a product rises or falls with the key, and so picks the outermost.

    Both learn side by side, independently of each other.
    """
    draw = lambda i, *shape: normal(*shape, seed=i) / shape[0] ** 0.5
    zeros = lambda n: np.zeros(n, np.float32)
    network = draw(0, 2, 16), zeros(16), draw(1, 16, 8), zeros(8), draw(2, 8)
    start = network, np.ones((2, 2), np.float32)
    loss = lambda params, key: losses(params, key)[0]
    params = training.fit(loss, start, steps=300, learning_rate=0.03)
    neural, product = jax.device_get(jax.jit(losses)(params, jax.random.key(1))[1])
    assert neural > 0.8 and product < 0.5


def test_network_that_ignores_the_key_gives_the_mean_of_what_is_seen():
    """In a sequence of more queries than are scored at once, with a rest."""
    args = example(130) | dict(w1=example(130)["w1"].copy())
    args["w1"][4:] = 0  # the rows of the key
    mean = np.cumsum(args["v"], 1) / np.arange(1, 131, dtype=np.float32)[None, :, None, None]
    chex.assert_trees_all_close(causal(args), mean, rtol=1e-5, atol=1e-5)


@jax.jit
def causal(args):
    return lib.neural_attention(**args, mask=masks.Causal())


def test_many_queries_give_what_each_gives_alone():
    """More than are scored at once, with a rest."""
    args = example(130)

    @jax.jit
    def alone(args, q, t):
        return lib.neural_attention(**(args | dict(q=q)), mask=masks.Causal(), q_offset=t)[:, 0]

    whole = jax.device_get(causal(args))
    for t in (0, 63, 64, 129):
        expected = alone(args, args["q"][:, t : t + 1], t)
        chex.assert_trees_all_close(whole[:, t], expected, rtol=1e-5, atol=1e-5)


def test_no_array_of_all_pairs_is_held():
    args = jax.eval_shape(lambda: lib.SPEC.example(KEY, 1024))
    grad = jax.grad(lambda args: lib.neural_attention(**args).sum())
    pairs = 2 * 4 * 6 * 1024**2  # B N F T S
    assert cost.largest_array(grad, args) <= pairs / 16


def test_arguments_that_do_not_fit():
    args = jax.eval_shape(lambda: lib.SPEC.example(KEY, 3))
    wrong = args | dict(w1=jax.ShapeDtypeStruct((7, 6), "float32"))
    with pytest.raises(ValueError, match=r"w1 \(7, 6\) must have 2 \* P=4 rows"):
        jax.eval_shape(lambda args: lib.neural_attention(**args), wrong)
    with pytest.raises(ValueError, match="reduced_dim=1 must be at least 2"):
        jax.eval_shape(lib.NeuralAttention(2, 4, reduced_dim=1).init, KEY, normal(1, 3, 8))
