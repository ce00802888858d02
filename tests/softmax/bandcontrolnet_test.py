"""Only what is particular to BandControlNet; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks, sharding
from attnjax.ops import dot_product_attention as ops
from attnjax.softmax import bandcontrolnet as lib

KEY = jax.random.key(0)
T, L, D = 8, 4, 8
BARS = jnp.array([[0, 0, 0, 1, 1, 2, 3, 3], [0, 1, 1, 1, 2, 2, 2, 2]])
ARGS = lib.SPEC.example(KEY, T) | dict(bars=BARS)
MODULE = lib.Bandcontrolnet(num_heads=2, head_dim=4)
X = jax.random.normal(KEY, (2, T, D))
FEATURES = jax.random.normal(jax.random.key(1), (2, L, 6))
PARAMS = jax.jit(MODULE.init)(KEY, X)
SIMILARITY = lib.BarSimilarity()
OF_BARS = jax.jit(SIMILARITY.init)(KEY, FEATURES)
CAUSAL = dict(mask=masks.Causal())

# ---- structure-enhanced attention ----


def test_bars_that_are_all_alike_change_nothing():
    args = ARGS | dict(similarity=jnp.ones((2, L, L)))
    expected = ops.dot_product_attention(*(ARGS[name] for name in "qkv"), **CAUSAL)
    chex.assert_trees_all_close(lib.bandcontrolnet(**args, **CAUSAL), expected, rtol=1e-6)
    ones = dict(similarity=args["similarity"], bars=BARS)
    actual = MODULE.apply(PARAMS, X, **ones, **CAUSAL)
    chex.assert_trees_all_close(actual, MODULE.apply(PARAMS, X, **CAUSAL), rtol=1e-6)


def test_scores_are_multiplied_by_the_similarity_of_their_bars():
    """By loops over bars, as the authors fill in a map of tokens."""
    factor = np.ones((2, T, T), np.float32)
    for b in range(2):
        for i in range(L):
            for j in range(L):
                rows, columns = np.asarray(BARS[b] == i), np.asarray(BARS[b] == j)
                factor[b][np.ix_(rows, columns)] = ARGS["similarity"][b, i, j]

    def spy(score, b, n, t, s):
        return score / jnp.asarray(factor)[b, t, s]  # and back again

    seen = edit.matrix(lib.bandcontrolnet, *ARGS.values(), score_mod=spy)
    expected = edit.matrix(ops.dot_product_attention, *(ARGS[name] for name in "qkv"))
    chex.assert_trees_all_close(seen, expected, rtol=1e-3, atol=1e-5)


def test_a_bar_of_similarity_zero_is_seen_whatever_it_says():
    none = ARGS["similarity"].at[:, 1, 0].set(0.0)
    w = edit.matrix(lib.bandcontrolnet, *(ARGS | dict(similarity=none)).values())
    block = w[0, :, 3:5, :3]
    chex.assert_trees_all_close(block, jnp.broadcast_to(block[..., :1], block.shape), rtol=1e-5)


def test_similarity_is_a_normed_softmax_of_scaled_products():
    q, k = jax.random.normal(KEY, (2, 2, L, 6))
    scale, bias = np.arange(1, 5, dtype=np.float32), np.arange(4, dtype=np.float32)
    actual = lib.bar_similarity(q, k, jnp.asarray(scale), jnp.asarray(bias))
    w = np.exp(np.asarray(q) @ np.asarray(k).swapaxes(1, 2) / np.sqrt(6))
    w /= w.sum(-1, keepdims=True)
    normed = (w - w.mean(-1, keepdims=True)) / np.sqrt(w.var(-1, keepdims=True) + 1e-5)
    chex.assert_trees_all_close(actual, normed * scale + bias, rtol=1e-4, atol=1e-5)


def test_bars_of_another_piece_length_have_no_influence():
    valid = jnp.arange(L)[None] < jnp.array([[2], [4]])
    other = FEATURES.at[0, 2:].set(9.0)
    run = lambda f: SIMILARITY.apply(OF_BARS, f, valid=valid)
    chex.assert_trees_all_equal(run(FEATURES)[0, :2], run(other)[0, :2])
    full = SIMILARITY.apply(OF_BARS, FEATURES)
    chex.assert_trees_all_close(run(FEATURES)[1], full[1], rtol=1e-5)


def test_a_bar_is_most_like_one_with_its_features_and_turns_from_others():
    f = jnp.eye(L)[None] * 9
    s = lib.bar_similarity(f.at[:, 3].set(f[:, 1]), f, jnp.ones(L), jnp.zeros(L))[0]
    assert (s.argmax(-1) == jnp.array([0, 1, 2, 1])).all()
    assert ((s > 0).sum(-1) == 1).all()


def test_features_teach_their_projections():
    def loss(params, x):
        s = SIMILARITY.apply(params["bars"], FEATURES)
        return (MODULE.apply(params["layer"], x, similarity=s, bars=BARS, **CAUSAL) ** 2).sum()

    params = dict(bars=OF_BARS, layer=PARAMS)
    for path, grad in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params, X)):
        assert jnp.isfinite(grad).all() and grad.any(), jax.tree_util.keystr(path)
    sharding.partition_specs(params)  # each has a rule


def test_nothing_comes_from_the_future_for_any_similarity():
    s = SIMILARITY.apply(OF_BARS, FEATURES)
    loss = lambda x: (MODULE.apply(PARAMS, x, similarity=s, bars=BARS, **CAUSAL)[:, 4] ** 2).sum()
    grad = jax.jit(jax.grad(loss))(X)
    assert grad[:, :5].any(-1).all() and not grad[:, 5:].any()


def test_streams_bars():
    options = dict(similarity=SIMILARITY.apply(OF_BARS, FEATURES))

    @jax.jit
    def stream():
        state, ys = MODULE.apply(PARAMS, 2, T, method="init_state"), []
        for start, end in ((0, 3), (3, 4), (4, 8)):
            piece = options | dict(bars=BARS[:, start:end])
            state, y = MODULE.apply(PARAMS, state, X[:, start:end], method="extend", **piece)
            ys.append(y)
        return jnp.concatenate(ys, 1)

    expected = MODULE.apply(PARAMS, X, bars=BARS, **options, **CAUSAL)
    chex.assert_trees_all_close(stream(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="similarity and bars must be given together"):
        MODULE.apply(PARAMS, X, bars=BARS)


# ---- the cross-track transformer ----

TRACKS = lib.CrossTracks(num_heads=2, head_dim=4, mlp_dim=16)
PIECE = jax.random.normal(KEY, (1, 3, T, D))
STARTS = jnp.array([[[0, 3, 5], [0, 2, 7], [0, 4, T]]])  # the last track ends after two bars
MEET = jax.jit(TRACKS.init)(KEY, PIECE, STARTS)


@jax.jit
def meet(x):
    return TRACKS.apply(MEET, x, STARTS)


def test_only_first_tokens_of_bars_change():
    first = (np.asarray(STARTS)[..., None] == np.arange(T)).any(2)
    changed = (meet(PIECE) != PIECE).any(-1)
    np.testing.assert_array_equal(changed, first)


def test_tracks_meet_in_their_own_bar_and_nowhere_else():
    jacobian = jax.jit(jax.jacobian(lambda x: meet(x)[0].sum(-1)))(PIECE)[:, :, 0]  # R T R T D
    reached = np.array(jacobian.any(-1))
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
    without = TRACKS.apply(MEET, PIECE[:, :2], STARTS[:, :2])
    i, j = 5, 7  # in the third bar
    y = meet(PIECE)
    chex.assert_trees_all_close(y[:, 0, i], without[:, 0, i], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(y[:, 1, j], without[:, 1, j], rtol=1e-4, atol=1e-5)
    assert jnp.abs(y[:, 0, 0] - without[:, 0, 0]).max() > 1e-3


def test_a_bar_knows_its_number():
    same = jnp.broadcast_to(PIECE[:, :, :1], PIECE.shape)
    first, second = meet(same)[0, 0, 0], meet(same)[0, 0, 3]
    assert jnp.abs(first - second).max() > 1e-2


def test_the_order_of_tracks_does_not_matter():
    order = jnp.array([2, 0, 1])
    turned = TRACKS.apply(MEET, PIECE[:, order], STARTS[:, order])
    chex.assert_trees_all_close(turned, meet(PIECE)[:, order], rtol=1e-4, atol=1e-5)
