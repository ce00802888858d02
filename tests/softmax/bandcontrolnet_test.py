"""Only what is particular to BandControlNet; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks, sharding
from attnjax.ops import dot_product_attention as ops
from attnjax.softmax import bandcontrolnet as lib
from tests.cotangents import like

KEY = jax.random.key(0)
T, L, D = 8, 4, 8


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def begin(module, *args):
    params = like(jax.eval_shape(module.init, KEY, *args))
    return jax.tree.map(lambda p: jnp.asarray(p / 3), jax.device_get(params))


BARS = jnp.asarray(np.array([[0, 0, 0, 1, 1, 2, 3, 3], [0, 1, 1, 1, 2, 2, 2, 2]], np.int32))
ARGS = dict(zip("qkv", normal(3, 2, T, 4, 8), strict=True))
ARGS |= dict(similarity=normal(2, L, L, seed=1), bars=BARS)
MODULE = lib.Bandcontrolnet(num_heads=2, head_dim=4)
X = normal(2, T, D)
FEATURES = normal(2, L, 6, seed=1)
PARAMS = begin(MODULE, X)
SIMILARITY = lib.BarSimilarity()
OF_BARS = begin(SIMILARITY, FEATURES)
CAUSAL = dict(mask=masks.Causal())

# ---- structure-enhanced attention ----


def test_bars_that_are_all_alike_change_nothing():
    ones = np.ones((2, L, L), np.float32)

    @jax.jit
    def both(args, params, x, ones):
        given = dict(similarity=ones, bars=BARS)
        actual = lib.bandcontrolnet(**(args | given), **CAUSAL)
        expected = ops.dot_product_attention(*(args[name] for name in "qkv"), **CAUSAL)
        with_bars = MODULE.apply(params, x, **given, **CAUSAL)
        return (actual, with_bars), (expected, MODULE.apply(params, x, **CAUSAL))

    chex.assert_trees_all_close(*both(ARGS, PARAMS, X, ones), rtol=1e-6)


def test_scores_are_multiplied_by_the_similarity_of_their_bars():
    """By loops over bars, as the authors fill in a map of tokens."""
    factor, bars = np.ones((2, T, T), np.float32), np.asarray(BARS)
    for b in range(2):
        for i in range(L):
            for j in range(L):
                factor[b][np.ix_(bars[b] == i, bars[b] == j)] = ARGS["similarity"][b, i, j]

    @jax.jit
    def both(args):
        def spy(score, b, n, t, s):
            return score / jnp.asarray(factor)[b, t, s]  # and back again

        seen = edit.matrix(lib.bandcontrolnet, *args, score_mod=spy)
        return seen, edit.matrix(ops.dot_product_attention, *args[:3])

    args = tuple(ARGS[name] for name in ("q", "k", "v", "similarity", "bars"))
    chex.assert_trees_all_close(*both(args), rtol=1e-3, atol=1e-5)


def test_a_bar_of_similarity_zero_is_seen_whatever_it_says():
    none = ARGS["similarity"].copy()
    none[:, 1, 0] = 0.0
    args = tuple(ARGS[name] for name in "qkv")
    w = jax.jit(lambda *x: edit.matrix(lib.bandcontrolnet, *x))(*args, none, BARS)
    block = jax.device_get(w)[0, :, 3:5, :3]
    chex.assert_trees_all_close(block, np.broadcast_to(block[..., :1], block.shape), rtol=1e-5)


def test_similarity_is_a_normed_softmax_of_scaled_products():
    q, k = normal(2, 2, L, 6)
    scale, bias = np.arange(1, 5, dtype=np.float32), np.arange(4, dtype=np.float32)
    actual = jax.jit(lib.bar_similarity)(q, k, scale, bias)
    w = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(np.float32(6)))
    w /= w.sum(-1, keepdims=True)
    normed = (w - w.mean(-1, keepdims=True)) / np.sqrt(w.var(-1, keepdims=True) + 1e-5)
    chex.assert_trees_all_close(actual, normed * scale + bias, rtol=1e-4, atol=1e-5)


def test_bars_of_another_piece_length_have_no_influence():
    valid, other = np.arange(L)[None] < np.array([[2], [4]]), FEATURES.copy()
    other[0, 2:] = 9.0
    run = jax.jit(lambda f, valid: SIMILARITY.apply(OF_BARS, f, valid=valid))
    of = lambda *args: jax.device_get(run(*args))
    first, second = of(FEATURES, valid), of(other, valid)
    full = jax.jit(lambda f: SIMILARITY.apply(OF_BARS, f))(FEATURES)
    chex.assert_trees_all_equal(first[0, :2], second[0, :2])
    chex.assert_trees_all_close(first[1], full[1], rtol=1e-5)


def test_a_bar_is_most_like_one_with_its_features_and_turns_from_others():
    f = 9 * np.eye(L, dtype=np.float32)[None]
    one = np.ones(L, np.float32)
    s = jax.device_get(jax.jit(lib.bar_similarity)(f[:, [0, 1, 2, 1]], f, one, 0 * one))[0]
    assert (s.argmax(-1) == np.array([0, 1, 2, 1])).all()
    assert ((s > 0).sum(-1) == 1).all()


def test_features_teach_their_projections_and_nothing_comes_from_the_future():
    """For any similarity."""

    def loss(params, x):
        s = SIMILARITY.apply(params["bars"], jnp.asarray(FEATURES))
        y = MODULE.apply(params["layer"], x, similarity=s, bars=BARS, **CAUSAL)
        return (y[:, :5] ** 2).sum()

    params = dict(bars=OF_BARS, layer=PARAMS)
    grads, grad = jax.device_get(jax.jit(jax.grad(loss, (0, 1)))(params, X))
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert np.isfinite(leaf).all() and leaf.any(), jax.tree_util.keystr(path)
    assert grad[:, :5].any(-1).all() and not grad[:, 5:].any()
    sharding.partition_specs(params)  # each has a rule


def test_streams_bars():
    @jax.jit
    def both(params, of_bars, x, features):
        options = dict(similarity=SIMILARITY.apply(of_bars, features))
        state, ys = MODULE.apply(params, 2, T, method="init_state"), []
        for start, end in ((0, 3), (3, 4), (4, 8)):
            piece = options | dict(bars=BARS[:, start:end])
            state, y = MODULE.apply(params, state, x[:, start:end], method="extend", **piece)
            ys.append(y)
        expected = MODULE.apply(params, x, bars=BARS, **options, **CAUSAL)
        return jnp.concatenate(ys, 1), expected

    found, expected = both(PARAMS, OF_BARS, X, FEATURES)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="similarity and bars must be given together"):
        jax.eval_shape(lambda x: MODULE.apply(PARAMS, x, bars=BARS), X)


# ---- the cross-track transformer ----

TRACKS = lib.CrossTracks(num_heads=2, head_dim=4, mlp_dim=16)
PIECE = normal(1, 3, T, D)
STARTS = np.array([[[0, 3, 5], [0, 2, 7], [0, 4, T]]], np.int32)  # the last ends after two bars
MEET = begin(TRACKS, PIECE, STARTS)
MANY = jax.jit(TRACKS.apply)


def meet(x, starts=STARTS):
    return jax.device_get(MANY(MEET, x, starts))


def test_only_first_tokens_of_bars_change():
    first = (STARTS[..., None] == np.arange(T)).any(2)
    changed = (meet(PIECE) != PIECE).any(-1)
    np.testing.assert_array_equal(changed, first)


def test_tracks_meet_in_their_own_bar_and_nowhere_else():
    run = lambda x: TRACKS.apply(MEET, x, jnp.asarray(STARTS))[0].sum(-1)
    jacobian = jax.device_get(jax.jit(jax.jacobian(run))(PIECE))[:, :, 0]  # R T R T D
    reached = jacobian.any(-1)
    for bar in range(3):
        for a, i in enumerate(STARTS[0, :, bar].tolist()):
            for b, j in enumerate(STARTS[0, :, bar].tolist()):
                if i < T and j < T:
                    assert reached[a, i, b, j]
                    reached[a, i, b, j] = False
    # what is left is each other token, that is itself
    tokens = np.eye(3 * T, dtype=bool).reshape(3, T, 3, T)
    assert not (reached & ~tokens).any()


def test_a_track_that_is_not_there_is_not_met():
    y, without = meet(PIECE), meet(PIECE[:, :2], STARTS[:, :2])
    i, j = 5, 7  # in the third bar
    chex.assert_trees_all_close(y[:, 0, i], without[:, 0, i], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(y[:, 1, j], without[:, 1, j], rtol=1e-4, atol=1e-5)
    assert np.abs(y[:, 0, 0] - without[:, 0, 0]).max() > 1e-3


def test_a_bar_knows_its_number():
    y = meet(np.broadcast_to(PIECE[:, :, :1], PIECE.shape))
    assert np.abs(y[0, 0, 0] - y[0, 0, 3]).max() > 1e-2


def test_the_order_of_tracks_does_not_matter():
    order = [2, 0, 1]
    turned = meet(PIECE[:, order], STARTS[:, order])
    chex.assert_trees_all_close(turned, meet(PIECE)[:, order], rtol=1e-4, atol=1e-5)
