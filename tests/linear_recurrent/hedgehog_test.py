"""Only what is particular to Hedgehog; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import edit, masks
from attnjax.linear_recurrent import hedgehog as lib

KEY = jax.random.key(0)
T, N, H = 32, 2, 8
IDENTITY = np.broadcast_to(np.eye(H, dtype=np.float32)[None], (N, H, H))


def draw(i):
    """Queries and keys of random heads."""
    return jax.random.normal(jax.random.fold_in(KEY, i), (2, 2, T, N, H))


def softmax_weights(q, k):
    return jax.nn.softmax(jnp.einsum("BTNH,BSNH->BNTS", q, k) / H**0.5)


def linear_weights(q, k):
    w = jnp.einsum("BTNF,BSNF->BNTS", q, k)
    return w / (w.sum(-1, keepdims=True) + 1e-6)


def hedgehog_weights(q, k, maps):
    v = jnp.zeros((*k.shape[:3], 1))
    return edit.matrix(lib.hedgehog, q, k, v, *maps)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def example(T):
    """As that of the record, by numpy."""
    q, k, v = normal(3, 2, T, 4, 8)
    query_map, key_map = normal(2, 4, 6, 8, seed=1) / 2
    return dict(q=q, k=k, v=v, query_map=query_map, key_map=key_map)


def test_queries_may_be_scaled_at_will():
    """So the features of the paper, which are not divided by their sum, give queries the same."""

    @jax.jit
    def both(args):
        z = jnp.einsum("BTNH,NFH->BTNF", args["q"], args["query_map"])
        raw = jnp.exp(jnp.concatenate([z, -z], -1))
        w = linear_weights(raw, lib.phi(args["k"], args["key_map"]))
        return edit.matrix(lib.hedgehog, **args), w

    chex.assert_trees_all_close(*both(example(9)), rtol=1e-4, atol=1e-5)


def test_features_are_positive_and_turn_over_with_the_sign():
    x, weight = example(9)["q"], example(9)["query_map"]
    phi = jax.jit(lib.phi)
    features, turned, large = (jax.device_get(phi(s * x, weight)) for s in (1, -1, 1e4))
    assert features.shape == (2, 9, 4, 12) and (features > 0).all()
    chex.assert_trees_all_close(turned, np.roll(features, 6, -1), rtol=1e-6)
    assert np.isfinite(large).all()


def test_maps_begin_as_the_identity():
    module = lib.Hedgehog(num_heads=N, head_dim=H)
    init = lambda: module.init(KEY, jnp.zeros((1, 3, 16)))["params"]
    maps = jax.jit(lambda: [init()[name]["table"] for name in ("query_map", "key_map")])()
    chex.assert_trees_all_equal(maps, [IDENTITY] * 2)


def test_maps_of_zero_give_the_mean_of_what_is_seen():
    args = example(9)
    args["query_map"] = 0 * args["query_map"]
    mean = np.cumsum(args["v"], 1) / np.arange(1, 10, dtype=np.float32)[None, :, None, None]
    whole = np.broadcast_to(mean[:, -1:], mean.shape)
    run = jax.jit(lambda args: [lib.hedgehog(**args, mask=m) for m in (masks.Causal(), None)])
    chex.assert_trees_all_close(run(args), [mean, whole], rtol=1e-5, atol=1e-5)


def test_pieces_through_the_state_equal_the_whole():
    causal = functools.partial(lib.hedgehog, mask=masks.Causal(), return_state=True)

    @jax.jit
    def run(args):
        maps = args["query_map"], args["key_map"]
        qkv = lambda piece: (args[name][:, piece] for name in "qkv")
        first, state = causal(*qkv(slice(0, 5)), *maps)
        assert state.shape == (2, 4, 12, 9)  # 2F features; V values and the normaliser
        second, end = causal(*qkv(slice(5, 12)), *maps, initial_state=state)
        return (jnp.concatenate([first, second], 1), end), causal(**args)

    chex.assert_trees_all_close(*run(example(12)), rtol=1e-5, atol=1e-5)


def test_carry_is_what_becomes_of_an_initial_state():
    @jax.jit
    def both(args, start, ids):
        pairs = []
        for mask in (masks.Causal(), masks.Causal() & masks.Segments(ids)):
            run = functools.partial(lib.hedgehog, **args, mask=mask, return_state=True)
            left = run(initial_state=start)[1] - run()[1]
            pairs.append((left, lib.SPEC.carry(**args, mask=mask) * start))
        return tuple(zip(*pairs, strict=True))

    ids = np.array([[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]], np.int32)
    actual, expected = both(example(6), np.ones((2, 4, 12, 9), np.float32), ids)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@jax.jit
def losses(q, k, maps, valid):
    """(the loss, what it is made of), the loss of causal attention, of keys that are hidden."""
    p, w = softmax_weights(q, k), hedgehog_weights(q, k, maps)
    expected = -(p * jnp.log(w)).sum(-1).mean()
    run = lambda maps, mask: lib.distillation_loss(q, k, *maps, mask=mask)
    hidden = jax.value_and_grad(run)(maps, masks.Valid(valid))
    return (run(maps, None), expected), run(maps, masks.Causal()), hidden


def test_loss_is_the_cross_entropy_of_the_weights():
    q, k = normal(2, 2, T, N, H)
    (actual, expected), *_ = losses(q, k, normal(2, N, H, H) / 2, np.ones((2, T), bool))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


def test_loss_under_a_mask_counts_what_is_seen():
    q, k = normal(2, 2, T, N, H)
    nothing = np.zeros((2, N, H, H), np.float32)  # uniform weights: log(number of keys seen)
    _, causal, _ = losses(q, k, nothing, np.zeros((2, T), bool))
    chex.assert_trees_all_close(causal, np.log(np.arange(1.0, T + 1)).mean(), rtol=1e-5)
    _, _, unseen = jax.device_get(losses(q, k, nothing + 1, np.zeros((2, T), bool)))
    assert unseen[0] == 0 and not unseen[1].any()


def distill(maps, steps=200, rate=0.02):
    """The maps after gradient descent by Adam on fresh heads."""

    def step(carry, i):
        maps, mean, square = carry
        grad = jax.grad(lambda maps: lib.distillation_loss(*draw(i), *maps))(maps)
        mean, square = 0.9 * mean + 0.1 * grad, 0.99 * square + 0.01 * grad**2
        size = jnp.sqrt(square / (1 - 0.99 ** (i + 1.0)))
        return (maps - rate * mean / (1 - 0.9 ** (i + 1.0)) / (size + 1e-8), mean, square), None

    carry = maps, jnp.zeros_like(maps), jnp.zeros_like(maps)
    return jax.lax.scan(step, carry, jnp.arange(steps))[0][0]


def ranks(x):
    order = np.argsort(np.argsort(x, -1), -1).astype(np.float32)
    return order - order.mean(-1, keepdims=True)


def monotone(w, p):
    """Mean rank correlation of each query's weights with softmax's."""
    a, b = ranks(w), ranks(p)
    return ((a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))).mean()


def cosine(x):
    """relu features reweighted by position, whose products fall with distance."""
    angle = jnp.pi / 2 * jnp.arange(T)[None, :, None, None] / T
    return jnp.concatenate([jax.nn.relu(x) * f(angle) for f in (jnp.cos, jnp.sin)], -1)


def elu(x):
    return jax.nn.elu(x) + 1


@jax.jit
def learned_and_fixed():
    """Weights of softmax, of trained maps, of maps at the start, and of features that are fixed."""
    q, k = draw(1000)
    start = jnp.stack([IDENTITY, IDENTITY])
    fixed = [linear_weights(f(q), f(k)) for f in (elu, jax.nn.relu, cosine)]
    ours = [hedgehog_weights(q, k, maps) for maps in (distill(start), start)]
    return softmax_weights(q, k), *ours, fixed


def test_distilled_it_is_nearer_to_softmax_than_fixed_maps():
    """The headline: 200 steps, judged on heads that were not seen in training."""
    p, w, untrained, fixed = jax.device_get(learned_and_fixed())
    entropy = lambda w: -(w * np.log(w + 1e-9)).sum(-1).mean()
    divergence = lambda w: (p * np.log(p / (w + 1e-9))).sum(-1).mean()
    gap = lambda w: abs(entropy(w) - entropy(p))
    assert divergence(w) < 0.85 * divergence(untrained) and gap(w) < 0.8 * gap(untrained)
    assert gap(w) < 0.8 * gap(fixed[0])  # elu
    for other in fixed:
        assert divergence(w) < 0.7 * divergence(other)
        assert monotone(w, p) > 0.75 and monotone(w, p) > monotone(other, p) + 0.2
