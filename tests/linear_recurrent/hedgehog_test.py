"""Only what is particular to Hedgehog; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp

from attnjax.core import edit, masks
from attnjax.linear_recurrent import hedgehog as lib

KEY = jax.random.key(0)
T, N, H = 32, 2, 8
IDENTITY = jnp.broadcast_to(jnp.eye(H)[None], (N, H, H))


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


def test_queries_may_be_scaled_at_will():
    """So the features of the paper, which are not divided by their sum, give queries the same."""
    args = lib.SPEC.example(KEY, 9)
    z = jnp.einsum("BTNH,NFH->BTNF", args["q"], args["query_map"])
    raw = jnp.exp(jnp.concatenate([z, -z], -1))
    w = linear_weights(raw, lib.phi(args["k"], args["key_map"]))
    actual = edit.matrix(lib.hedgehog, **args)
    chex.assert_trees_all_close(actual, w, rtol=1e-4, atol=1e-5)


def test_features_are_positive_and_turn_over_with_the_sign():
    x = lib.SPEC.example(KEY, 9)["q"]
    weight = lib.SPEC.example(KEY, 9)["query_map"]
    features = lib.phi(x, weight)
    assert features.shape == (2, 9, 4, 12) and (features > 0).all()
    chex.assert_trees_all_close(lib.phi(-x, weight), jnp.roll(features, 6, -1), rtol=1e-6)
    assert jnp.isfinite(lib.phi(x * 1e4, weight)).all()


def test_maps_begin_as_the_identity():
    params = lib.Hedgehog(num_heads=N, head_dim=H).init(KEY, jnp.zeros((1, 3, 16)))["params"]
    for name in ("query_map", "key_map"):
        chex.assert_trees_all_equal(params[name]["table"], IDENTITY)


def test_maps_of_zero_give_the_mean_of_what_is_seen():
    args = lib.SPEC.example(KEY, 9)
    nothing = args | dict(query_map=0 * args["query_map"])
    mean = jnp.cumsum(args["v"], 1) / jnp.arange(1, 10)[None, :, None, None]
    causal = lib.hedgehog(**nothing, mask=masks.Causal())
    chex.assert_trees_all_close(causal, mean, rtol=1e-5, atol=1e-5)
    whole = jnp.broadcast_to(mean[:, -1:], mean.shape)
    chex.assert_trees_all_close(lib.hedgehog(**nothing), whole, rtol=1e-5, atol=1e-5)


def test_pieces_through_the_state_equal_the_whole():
    args = lib.SPEC.example(KEY, 12)
    maps = args["query_map"], args["key_map"]
    qkv = lambda piece: (args[name][:, piece] for name in "qkv")
    causal = functools.partial(lib.hedgehog, mask=masks.Causal(), return_state=True)

    @jax.jit
    def run():
        first, state = causal(*qkv(slice(0, 5)), *maps)
        assert state.shape == (2, 4, 12, 9)  # 2F features; V values and the normaliser
        second, end = causal(*qkv(slice(5, 12)), *maps, initial_state=state)
        return (jnp.concatenate([first, second], 1), end), causal(**args)

    chex.assert_trees_all_close(*run(), rtol=1e-5, atol=1e-5)


def test_carry_is_what_becomes_of_an_initial_state():
    args = lib.SPEC.example(KEY, 6)
    packed = masks.Segments(jnp.array([[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]]))
    start = jnp.ones((2, 4, 12, 9))
    for mask in (masks.Causal(), masks.Causal() & packed):
        run = functools.partial(lib.hedgehog, **args, mask=mask, return_state=True)
        left = run(initial_state=start)[1] - run()[1]
        expected = lib.SPEC.carry(**args, mask=mask) * start
        chex.assert_trees_all_close(left, expected, rtol=1e-5, atol=1e-5)


def test_loss_is_the_cross_entropy_of_the_weights():
    q, k = draw(0)
    maps = jax.random.normal(KEY, (2, N, H, H)) / 2
    p, w = softmax_weights(q, k), hedgehog_weights(q, k, maps)
    expected = -(p * jnp.log(w)).sum(-1).mean()
    chex.assert_trees_all_close(lib.distillation_loss(q, k, *maps), expected, rtol=1e-5)


def test_loss_under_a_mask_counts_what_is_seen():
    q, k = draw(0)
    nothing = jnp.zeros((2, N, H, H))  # uniform weights: the loss is log(number of keys seen)
    loss = jax.jit(lambda mask: lib.distillation_loss(q, k, *nothing, mask=mask))
    causal = jnp.log(jnp.arange(1.0, T + 1)).mean()
    chex.assert_trees_all_close(loss(masks.Causal()), causal, rtol=1e-5)
    unseen = masks.Valid(jnp.zeros((2, T), bool))
    grad = jax.grad(lambda maps: lib.distillation_loss(q, k, *maps, mask=unseen))(nothing + 1)
    assert loss(unseen) == 0 and not grad.any()


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
    order = jnp.argsort(jnp.argsort(x, -1), -1).astype(jnp.float32)
    return order - order.mean(-1, keepdims=True)


def monotone(w, p):
    """Mean rank correlation of each query's weights with softmax's."""
    a, b = ranks(w), ranks(p)
    return ((a * b).sum(-1) / jnp.sqrt((a * a).sum(-1) * (b * b).sum(-1))).mean()


def cosine(x):
    """relu features reweighted by position, whose products fall with distance."""
    angle = jnp.pi / 2 * jnp.arange(T)[None, :, None, None] / T
    return jnp.concatenate([jax.nn.relu(x) * f(angle) for f in (jnp.cos, jnp.sin)], -1)


def test_distilled_it_is_nearer_to_softmax_than_fixed_maps():
    """The headline: 200 steps, judged on heads that were not seen in training."""
    start = jnp.stack([IDENTITY, IDENTITY])
    q, k = draw(1000)
    p = softmax_weights(q, k)
    entropy = lambda w: -(w * jnp.log(w + 1e-9)).sum(-1).mean()
    divergence = lambda w: (p * jnp.log(p / (w + 1e-9))).sum(-1).mean()
    elu = lambda x: jax.nn.elu(x) + 1
    fixed = {f: linear_weights(f(q), f(k)) for f in (elu, jax.nn.relu, cosine)}
    w, untrained = jax.jit(
        lambda: (hedgehog_weights(q, k, distill(start)), hedgehog_weights(q, k, start))
    )()
    gap = lambda w: abs(entropy(w) - entropy(p))
    assert divergence(w) < 0.85 * divergence(untrained) and gap(w) < 0.8 * gap(untrained)
    assert gap(w) < 0.8 * gap(fixed[elu])
    for other in fixed.values():
        assert divergence(w) < 0.7 * divergence(other)
        assert monotone(w, p) > 0.75 and monotone(w, p) > monotone(other, p) + 0.2
