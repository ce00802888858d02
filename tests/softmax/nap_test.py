import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import parallel
from attnjax.core import edit, masks
from attnjax.ops import dot_product_attention as ops
from attnjax.softmax import nap as lib
from tests.parallel import helpers as devices

T = 9
CAUSAL = dict(mask=masks.Causal())


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def example():
    """As that of the record, by numpy."""
    q, k, v = normal(3, 2, T, 4, 8)
    gain, bias = normal(2, 4, seed=1) / 2 + 1
    return dict(q=q, k=k, v=v, gain=gain, bias=bias)


ARGS = example()


def test_scale_and_offset_of_the_scores_do_not_matter():
    """c (q . (k + d)) = c q . k + c q . d, of which softmax sees the c."""

    @jax.jit
    def run(args):
        o = lib.nap(**args, **CAUSAL)[:, 1:]
        return o, ops.dot_product_attention(*(args[name] for name in "qkv"))

    shifted = ARGS["k"] + normal(1, 1, 4, 8, seed=2)
    actual, _ = run(ARGS | dict(q=5 * ARGS["q"], k=shifted))
    expected, softmax = jax.device_get(run(ARGS))
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)
    _, scaled = jax.device_get(run(ARGS | dict(q=5 * ARGS["q"])))
    assert np.abs(scaled - softmax).max() > 0.1


@pytest.mark.parametrize("causal", [True, False])
def test_weights_have_mean_b_and_deviation_g_over_the_keys_seen(causal):
    seen = np.array([True, True, False, True, True, True, True, False, True])

    @jax.jit
    def weights(args, valid):
        mask = masks.Valid(valid)
        return edit.matrix(lib.nap, *args, mask=mask & masks.Causal() if causal else mask)

    args = tuple(ARGS[name] for name in ("q", "k", "v", "gain", "bias"))
    w = jax.device_get(weights(args, np.broadcast_to(seen, (2, T))))
    visible = np.broadcast_to(seen & (np.tri(T, dtype=bool) if causal else True), w.shape)
    assert not np.where(visible, 0.0, w).any()
    rows = slice(1, None)  # a single key has no deviation
    mean = w.mean(-1, where=visible)[:, :, rows]
    std = w.std(-1, where=visible)[:, :, rows]
    by_head = lambda x: np.broadcast_to(x[None, :, None], mean.shape)
    chex.assert_trees_all_close(mean, by_head(ARGS["bias"]), rtol=1e-4)
    chex.assert_trees_all_close(std, by_head(np.abs(ARGS["gain"])), rtol=1e-4)


def test_leaves_the_convex_hull_of_the_values():
    q, one = np.ones((1, 1, 1, 1), np.float32), np.ones(1, np.float32)
    k, v = np.array([[1, 2, 6], [0, 0.5, 1]], np.float32)[:, None, :, None, None]
    both = jax.jit(lambda *x: (lib.nap(*x), ops.dot_product_attention(*x[:3])))
    o, softmax = jax.device_get(both(q, k, v, one, 0 * one))
    x = np.array([-2.0, -1, 3]) / np.sqrt(14 / 3)  # 1, 2, 6 less their mean 3
    expected = np.float32(x @ v[0, :, 0, 0])
    chex.assert_trees_all_close(o[0, 0, 0, 0], expected, rtol=1e-5)
    assert o > 1 >= softmax


def test_far_keys_cost_no_accuracy():
    """Sums of squares would lose the variance of keys that are far from zero; several chunks."""
    q, k, v = normal(3, 1, 300, 1, 4)

    @jax.jit
    def both(q, k, v):
        one, zero = jnp.ones(1), jnp.zeros(1)
        o = lib.nap(q, k + 64, v, one, zero, **CAUSAL)
        return o, lib.SPEC.oracle(q, k, v, one, zero, **CAUSAL)

    o, expected = jax.device_get(both(q, k, v))
    assert np.sqrt(np.mean((o - expected) ** 2) / np.mean(expected**2)) < 1e-4


def test_scores_that_are_all_alike_give_finite_weights():
    """Queries at right angles to all keys: the variance is rounding of either sign."""
    line, across = np.linalg.qr(normal(4, 4))[0][:2]
    q = normal(1, T, 1, 1, seed=1) * across * 100
    k = normal(1, T, 1, 1, seed=2) * line * 100
    run = jax.jit(lambda q, k: lib.nap(q, k, k, jnp.ones(1), jnp.ones(1)))
    assert np.isfinite(jax.device_get(run(q, k))).all()


@jax.jit
def in_two(args, ids):
    """(whole and in two documents), (the two parts alone and through the state), at once."""
    cut = lambda at: args | {name: args[name][:, at] for name in "qkv"}
    options = dict(**CAUSAL, return_state=True)
    first, state = lib.nap(**cut(slice(4)), **options)
    alone = lib.nap(**cut(slice(4, None)), **CAUSAL)
    rest, state = lib.nap(**cut(slice(4, None)), initial_state=state, **options)
    packed = lib.nap(**args, mask=masks.Causal() & masks.Segments(ids))
    parts = [jnp.concatenate([first, x], 1) for x in (alone, rest)]
    whole, end = lib.nap(**args, **options)
    _, at_once = lib.nap(**args, return_state=True)  # the same sums by another way
    return (packed, whole), parts, (end, state, at_once)


def test_documents_are_apart():
    (packed, _), (alone, _), _ = in_two(ARGS, np.array([[0] * 4 + [1] * 5] * 2, np.int32))
    chex.assert_trees_all_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_the_state_is_of_one_size_and_merges():
    state = lib.Nap(num_heads=3, head_dim=4).init_state
    shapes = [jax.eval_shape(lambda length=length: state(2, length)) for length in (5, 5000)]
    chex.assert_trees_all_equal_shapes(*shapes)
    (_, whole), (_, parts), states = in_two(ARGS, np.array([[0] * 4 + [1] * 5] * 2, np.int32))
    chex.assert_trees_all_close(parts, whole, rtol=1e-4, atol=1e-4)
    expected, *others = states
    for state in others:
        chex.assert_trees_all_close(state, expected, rtol=1e-4, atol=1e-4)


def test_refuses_what_it_cannot_do():
    state = jax.eval_shape(lambda args: lib.nap(**args, return_state=True)[1], ARGS)
    with pytest.raises(ValueError, match="initial_state needs a causal mask, which mask=None"):
        jax.eval_shape(lambda args, state: lib.nap(**args, initial_state=state), ARGS, state)
    ids = jnp.asarray(np.zeros((2, T), np.int32))
    with pytest.raises(NotImplementedError, match="Segments only together with Causal"):
        jax.eval_shape(lambda args: lib.nap(**args, mask=masks.Segments(ids)), ARGS)


def test_a_state_of_several_arrays_is_not_split():
    fn = parallel.shard("all_to_all", lib.SPEC, devices.mesh(context=4))
    fn = functools.partial(fn, **CAUSAL)
    state = jax.eval_shape(lambda args: lib.nap(**args, return_state=True)[1], ARGS)
    with pytest.raises(NotImplementedError, match="all_to_all can't honour an initial_state"):
        jax.eval_shape(lambda args, state: fn(**args, initial_state=state), ARGS, state)
    with pytest.raises(NotImplementedError, match="all_to_all can't honour return_state"):
        jax.eval_shape(lambda args: fn(**args, return_state=True), ARGS)
