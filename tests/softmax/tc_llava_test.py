"""Only what is particular to TC-LLaVA; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import edit, masks, positions, registry
from attnjax.ops import dot_product_attention as ops
from attnjax.softmax import tc_llava as lib
from tests.initial import initial

KEY = jax.random.key(0)
T = 9
#                    text    a frame   another  text
FRAMES = jnp.array([[-1, -1, 5, 5, 5, 6, 6, -1, -1], [0, 0, 1, 1, 2, 2, 2, -1, -1]])
TIMES = jnp.array([[0, 1, 2, 2, 2, 3, 3, 4, 5], [0, 0, 1, 1, 2, 2, 2, 3, 4]])
ARGS = initial(lambda key: lib.SPEC.example(key, T), KEY) | dict(times=TIMES)
MODULE = lib.TcLlava(num_heads=2, head_dim=4)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, T, 8)), jnp.float32)
PARAMS = initial(MODULE.init, KEY, X)


def weights(times, **options):
    return edit.matrix(lib.tc_llava, ARGS["q"], ARGS["k"], ARGS["v"], times, **options)


def test_time_goes_on_with_each_token_of_text_and_each_frame():
    np.testing.assert_array_equal(lib.clock(FRAMES), TIMES)
    np.testing.assert_array_equal(lib.clock(jnp.full((1, 4), -1)), jnp.arange(4)[None])
    numbers = jnp.array([[7, 7, 3, 0, 0]])  # in any order
    np.testing.assert_array_equal(lib.clock(numbers), jnp.array([[0, 0, 1, 2, 2]]))


def test_the_mask_is_that_of_the_paper():
    """Causal, and open within a frame."""
    frames = np.asarray(FRAMES)
    together = (frames[:, :, None] == frames[:, None]) & (frames >= 0)[:, None]
    expected = together | np.tril(np.ones((T, T), bool))
    seen = weights(TIMES) > 0
    np.testing.assert_array_equal(seen, np.broadcast_to(expected[:, None], seen.shape))


def test_nothing_sees_a_later_frame_through_any_number_of_layers():
    def first_frame(x):
        for _ in range(3):
            x = MODULE.apply(PARAMS, x, frames=FRAMES)
        return (x[0, 2:5] ** 2).sum()

    grad = jax.jit(jax.grad(first_frame))(X)[0]
    assert grad[:5].any(-1).all() and not grad[5:].any()


def test_frames_of_one_token_are_text_and_text_is_causal_attention():
    plain = registry.get("multi_head_attention").module(num_heads=2, head_dim=4, rotary_base=1e4)
    expected = plain.apply(PARAMS, X, mask=masks.Causal())
    still = MODULE.clone(time_scale=0.0)
    chex.assert_trees_all_close(still.apply(PARAMS, X), expected, rtol=1e-5, atol=1e-5)
    alone = jnp.arange(T)[None].repeat(2, 0)
    chex.assert_trees_all_equal(MODULE.apply(PARAMS, X, frames=alone), MODULE.apply(PARAMS, X))


def test_time_of_text_alone_stretches_distances_by_one_plus_gamma():
    args = {name: ARGS[name] for name in "qkv"}
    actual = lib.tc_llava(**args, times=jnp.arange(T)[None].repeat(2, 0), time_scale=2.0)
    q, k = (positions.rotary(ARGS[name], 3 * jnp.arange(T)) for name in "qk")
    expected = ops.dot_product_attention(q, k, ARGS["v"], mask=masks.Causal())
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_scores_depend_on_both_distances_and_on_nothing_else():
    first = {name: ARGS[name][:, :1] for name in "qkv"}
    same = lambda x: jnp.broadcast_to(x, (2, T, *x.shape[2:]))  # the same token everywhere
    q, k = same(first["q"]), same(first["k"])
    at = lambda times: edit.matrix(lib.tc_llava, q, k, ARGS["v"], times)[0, 0]
    ratio = lambda w, t, s, r: w[t, s] / w[t, r]
    w = at(jnp.array([[0, 0, 0, 1, 1, 1, 2, 2, 2]] * 2))
    # the same distances, one frame later
    chex.assert_trees_all_close(ratio(w, 4, 3, 0), ratio(w, 7, 6, 3), rtol=1e-4)
    # as many tokens apart, within a frame and across: not the same
    assert abs(ratio(w, 5, 4, 3) / ratio(w, 6, 5, 4) - 1) > 1e-2
    moved = at(7 + jnp.array([[0, 0, 0, 1, 1, 1, 2, 2, 2]] * 2))
    chex.assert_trees_all_close(moved, w, rtol=1e-3, atol=1e-6)


def test_streams_frames_that_come_whole():
    @jax.jit
    def stream():
        state, ys = MODULE.apply(PARAMS, 2, T + 1, method="init_state"), []
        for start, end in ((0, 2), (2, 7), (7, 8), (8, 9)):
            piece = dict(frames=FRAMES[:, start:end])
            state, y = MODULE.apply(PARAMS, state, X[:, start:end], method="extend", **piece)
            ys.append(y)
        return jnp.concatenate(ys, 1), state.times

    ys, times = stream()
    expected = MODULE.apply(PARAMS, X, frames=FRAMES)
    np.testing.assert_array_equal(times, jnp.pad(TIMES, ((0, 0), (0, 1)), constant_values=-1))
    chex.assert_trees_all_close(ys, expected, rtol=1e-4, atol=1e-5)
