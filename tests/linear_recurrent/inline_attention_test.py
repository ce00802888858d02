"""Injectivity, the limit of softmax attention, and the kernels that an image has for itself."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit
from attnjax.linear_recurrent import inline_attention as lib
from attnjax.ops import dot_product_attention, linear_attention
from tests.cotangents import like

KEY = jax.random.key(0)
X, Y, N, H = 5, 4, 2, 4
S = X * Y


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw():
    return normal(3, 2, X, Y, N, H)


def flat(x):
    return x.reshape(2, S, N, -1)


@jax.jit
def matrix(q, k):
    """Without the local term."""
    v, kernel = jnp.zeros((2, X, Y, N, 1)), jnp.zeros((2, 3, 3, N, S))
    return edit.matrix(lib.inline_attention, q, k, v, kernel)


def weights(q, k):
    return jax.device_get(matrix(q, k))


@jax.jit
def attend(q, k, v, kernel):
    """And linear attention that divides by its sum, and softmax attention."""
    features = jax.nn.relu(flat(q)), jax.nn.relu(flat(k)), flat(v)
    softmax = dot_product_attention.dot_product_attention(flat(q), flat(k), flat(v))
    divided = linear_attention.linear_attention(*features)[0]
    return lib.inline_attention(q, k, v, kernel), divided, softmax


def run(q, k, v, kernel=None):
    kernel = np.zeros((2, 3, 3, N, H), np.float32) if kernel is None else kernel
    return jax.device_get(attend(q, k, v, kernel))


def test_weights_sum_to_one_and_may_be_negative():
    q, k, _ = draw()
    w = weights(10 * q, k)
    chex.assert_trees_all_close(w.sum(-1), np.ones((2, N, S), np.float32), rtol=1e-5, atol=1e-5)
    assert (w < 0).any()


def test_a_query_can_be_read_off_its_weights():
    """So no two queries have the same. Division by the sum makes even q and 2q the same."""
    q, k, v = draw()
    centred = (k - k.mean((1, 2), keepdims=True)).reshape(2, S, N, H).swapaxes(1, 2)
    scores = (weights(q, k) - np.float32(1 / S)) * np.float32(S * H**0.5)
    read = np.einsum("BNTS,BNHS->BTNH", scores, np.linalg.pinv(centred))
    chex.assert_trees_all_close(read, flat(q), rtol=1e-5, atol=1e-5)

    (_, twice, _), (_, once, _) = run(2 * q, k, v), run(q, k, v)
    chex.assert_trees_all_close(twice, once, rtol=1e-5, atol=1e-5)
    assert abs(weights(2 * q, k) - weights(q, k)).mean() > 0.1 / S


def test_is_softmax_attention_to_first_order_in_the_scores():
    q, k, v = draw()

    def error(scale):
        """And how much there is beside the mean of the values."""
        inline, _, softmax = run(q * np.float32(scale), k, v)
        mean = flat(v).mean(1, keepdims=True)
        return abs(softmax - flat(inline)).mean(), abs(flat(inline) - mean).mean()

    (large, _), (small, change) = error(0.1), error(0.05)
    assert small < 0.1 * change
    assert 3.5 < large / small < 4.5  # second order


def test_keys_may_move_together():
    """As in softmax attention, and unlike in linear attention."""
    (q, k, v), kernel = draw(), normal(2, 3, 3, N, H, seed=1)
    moved, still = run(q, k + 3, v, kernel)[0], run(q, k, v, kernel)[0]
    chex.assert_trees_all_close(moved, still, rtol=1e-5, atol=1e-5)


def test_the_local_term_is_added_by_image_and_channel():
    q, k, v = draw()
    itself, expected = np.zeros((2, 3, 3, N, H), np.float32), np.zeros_like(v)
    itself[1, 1, 1, 0, 2] = 1  # the middle, in one channel of the second image
    expected[1, :, :, 0, 2] = v[1, :, :, 0, 2]
    chex.assert_trees_all_close(run(q, k, v, itself)[0] - run(q, k, v)[0], expected, atol=1e-5)


def test_kernels_come_from_the_mean_of_the_image_head_by_head():
    module, D = lib.LocalKernel(num_heads=N, head_dim=H, size=3), 6
    x = normal(2, X, Y, D)
    params = jax.tree.map(
        lambda p: p / 3, jax.device_get(like(jax.eval_shape(module.init, KEY, x)))
    )
    program = jax.jit(module.apply)
    run = lambda x: jax.device_get(program(params, x))
    other = x.copy()
    other[1, ..., 3:] += 1.0  # the second head's half, of one image
    y = run(x)
    assert y.shape == (2, 3, 3, N, H)
    chex.assert_trees_all_close(run(x[:, ::-1]), y, rtol=1e-5, atol=1e-5)
    moved = run(other) - y
    assert not moved[0].any() and not moved[1, :, :, 0].any() and moved[1, :, :, 1].all()


def test_heads_must_share_the_channels_out():
    module = lib.InlineAttention(num_heads=3, head_dim=4)
    with pytest.raises(ValueError, match="D=8 must be a multiple of num_heads=3"):
        jax.eval_shape(module.init, KEY, normal(1, 4, 4, 8))
