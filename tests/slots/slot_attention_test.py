import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from sklearn import metrics

from attnjax.core import masks
from attnjax.slots import slot_attention as slots
from tests import training
from tests.cotangents import like
from tests.initial import initial

KEY = jax.random.key(0)


run = jax.jit(slots.slot_attention)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def arrays(M=4, S=9):
    return draw(2, M, 2, 8, seed=1), draw(2, S, 2, 8, seed=2), draw(2, S, 2, 5, seed=3)


def build(num_slots=3, **options):
    return slots.SlotAttention(num_slots, **(dict(head_dim=8, mlp_dim=16) | options))


def begin(module, *args):
    """Random parameters, norms and biases too."""
    params = like(jax.eval_shape(module.init, dict(params=KEY, noise=KEY), *args))
    return jax.tree.map(lambda p: p / 3, jax.device_get(params))


# ---- the update ----


def test_one_slot_gets_the_mean_of_the_inputs():
    _, k, v = arrays(S=40)
    u = run(100 * draw(2, 1, 2, 8), k, v)
    chex.assert_trees_all_close(u, v.mean(1, keepdims=True), rtol=1e-5, atol=1e-6)


def test_sharp_slots_make_a_step_of_k_means():
    q, k, v = arrays(M=3, S=40)
    u = jax.device_get(run(1e4 * q, k, v))
    winner = np.einsum("BMNH,BSNH->BNMS", q, k).argmax(2)
    for b, n, m in np.ndindex(2, 2, 3):
        own = v[b, winner[b, n] == m, n]
        np.testing.assert_allclose(u[b, m, n], own.mean(0), rtol=1e-4, atol=1e-5)


def test_slot_that_wins_nothing_gets_the_mean_of_all_inputs():
    k, v = np.ones((1, 5, 1, 8), np.float32), draw(1, 5, 1, 3)
    q = 1e3 * k[:, :2] * np.array([1, -1], np.float32)[None, :, None, None]
    both = jax.jit(lambda *x: (slots.slot_attention(*x), slots.slot_attention(*x, epsilon=0.0)))
    u, without = jax.device_get(both(q, k, v))
    chex.assert_trees_all_close(u[:, 1:], v.mean(1, keepdims=True))
    assert not without[:, 1:].any()


def test_padding_changes_nothing():
    q, k, v = arrays(S=9)
    v = np.abs(v)  # nothing cancels

    @jax.jit
    def both(q, k, v):
        padded = slots.slot_attention(q, k, v, mask=masks.Valid(jnp.arange(9)[None] < 6))
        return padded, slots.slot_attention(q, k[:, :6], v[:, :6])

    chex.assert_trees_all_close(*both(q, k, v), rtol=1e-5)
    with pytest.raises(NotImplementedError, match="slot_attention can't honour Causal"):
        jax.eval_shape(lambda *x: slots.slot_attention(*x, mask=masks.Causal()), q, k, v)


# ---- the module ----


def test_is_algorithm_1():
    x, module = draw(2, 7, 12), build(initial="learned")

    @jax.jit
    def both(params, x):
        p = params["params"]
        norm = lambda name, x: nn.LayerNorm().apply(dict(params=p[name]), x)
        heads = lambda name, x: jnp.einsum("BSD,DNH->BSNH", x, p[name]["heads"]["kernel"])

        def dense(name, x):
            return x @ p[name]["dense"]["kernel"] + p[name]["dense"]["bias"][None, None]

        def iteration(now, _):
            u = slots.SPEC.oracle(heads("query", norm("query_norm", now)), k, v)
            now = slots.gru(now, dense("by_input", u[:, :, 0]), dense("by_state", now))
            return now + dense("down", nn.relu(dense("up", norm("mlp_norm", now)))), None

        inputs, start = norm("input_norm", x), jnp.stack([p["slots"]["table"]] * 2)
        k, v = heads("key", inputs), heads("value", inputs)
        return module.apply(params, x), jax.lax.scan(iteration, start, length=3)[0]

    chex.assert_trees_all_close(*both(begin(module, x), x), rtol=1e-4, atol=1e-5)


def test_gru_is_that_of_flax():
    state, x, cell = draw(2, 3, 6), draw(2, 3, 5, seed=1), nn.GRUCell(6)

    @jax.jit
    def both(params, state, x):
        gate = lambda x, p: x @ p["kernel"] + p.get("bias", jnp.zeros(6))[None, None]
        gates = lambda x, *names: jnp.concatenate([gate(x, params["params"][n]) for n in names], -1)
        found = slots.gru(state, gates(x, "ir", "iz", "in"), gates(state, "hr", "hz", "hn"))
        return found, cell.apply(params, state, x)[1]

    params = like(jax.eval_shape(cell.init, KEY, state, x))
    chex.assert_trees_all_close(*both(params, state, x), rtol=1e-5, atol=1e-6)


def test_drawn_slots_have_the_learned_mean_and_spread():
    mean, sigma = np.array([1.0, -2.0], np.float32), np.array([0.5, 3.0], np.float32)
    drawn = jax.jit(lambda *x: slots.draw_slots(KEY, *x, 100, 100))(mean, np.log(sigma))
    drawn = jax.device_get(drawn)
    chex.assert_trees_all_close(drawn.mean((0, 1)), mean, atol=0.1)
    chex.assert_trees_all_close(drawn.std((0, 1)), sigma, rtol=0.05)


def test_drawn_slots_are_of_any_number_and_follow_the_noise():
    x = draw(2, 7, 12)
    run = jax.jit(lambda key, params, x: build(5).apply(params, x, rngs=dict(noise=key)))
    y, other = jax.device_get([run(jax.random.key(i), begin(build(3), x), x) for i in (0, 1)])
    assert y.shape == (2, 5, 12)
    assert abs(y - other).max() > 1e-2
    assert abs(y[:, 0] - y[:, 1]).max() > 1e-2


def test_learned_slots_need_no_noise_and_their_order_means_nothing():
    x, module, order = draw(2, 7, 12), build(initial="learned"), [2, 0, 1]
    params, run = begin(module, x), jax.jit(module.apply)
    y = jax.device_get(run(params, x))
    params["params"]["slots"]["table"] = params["params"]["slots"]["table"][order]
    chex.assert_trees_all_close(run(params, x), y[:, order], rtol=1e-4, atol=1e-5)


def test_refuses_another_beginning(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    with pytest.raises(ValueError, match="initial='fixed' must be 'drawn' or 'learned'"):
        begin(build(initial="fixed"), draw(2, 7, 12))


# ---- the claim: by competing again and again, slots find the parts of any number of parts ----


def groups_of_points(key, count, scenes):
    """Scenes of points in `count` groups of 8: what is seen of the points, and the points."""
    keys = jax.random.split(key)
    centres = jax.random.uniform(keys[0], (scenes, count, 4), minval=-1.5, maxval=1.5)
    points = jnp.repeat(centres, 8, 1)
    points = points + 0.15 * jax.random.normal(keys[1], points.shape)
    angles = points @ draw(4, 8, seed=9)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1), points


def distances(params, key, count, *, scenes=16, **options):
    """Squared distances of points to the centre that each slot proposes (B S M)."""
    features, points = groups_of_points(key, count, scenes)
    module = build(count, **(dict(head_dim=16, mlp_dim=32) | options))
    found = module.apply(params["slots"], features, rngs=dict(noise=key)) @ params["centres"]
    return ((points[:, :, None] - found[:, None]) ** 2).sum(-1)


def score(params, count, **options):
    test = functools.partial(distances, key=jax.random.key(5), count=count, scenes=64, **options)
    found = jax.jit(lambda params: test(params).argmin(-1))(params)
    truth = np.repeat(np.arange(count), 8)
    return np.mean([metrics.adjusted_rand_score(truth, row) for row in np.asarray(found)])


def test_trained_slots_find_groups_and_more_of_them_than_in_training():
    module = build(head_dim=16, mlp_dim=32)
    rngs = dict(params=KEY, noise=KEY)
    start = initial(module.init, rngs, jnp.asarray(draw(1, 4, 16)))
    params = dict(slots=start, centres=0.3 * draw(16, 4))
    loss = lambda params, key: -jax.nn.logsumexp(-5 * distances(params, key, 3), -1).mean()
    params = training.fit(loss, params, steps=600, learning_rate=5e-3)
    assert score(params, 3) > max(0.65, score(params, 3, num_iterations=1) + 0.08)
    assert score(params, 5) > 0.6
