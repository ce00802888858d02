"""Injectivity, the limit of softmax attention, and the kernels that an image has for itself."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import edit
from attnjax.linear_recurrent import inline_attention as lib
from attnjax.ops import dot_product_attention, linear_attention

KEY = jax.random.key(0)
X, Y, N, H = 5, 4, 2, 4
S = X * Y


def draw():
    return jax.random.normal(KEY, (3, 2, X, Y, N, H))


def flat(x):
    return x.reshape(2, S, N, -1)


def weights(q, k):
    """Without the local term."""
    v, kernel = jnp.zeros((2, X, Y, N, 1)), jnp.zeros((2, 3, 3, N, S))
    return jax.jit(lambda: edit.matrix(lib.inline_attention, q, k, v, kernel))()


def test_weights_sum_to_one_and_may_be_negative():
    q, k, _ = draw()
    w = weights(10 * q, k)
    chex.assert_trees_all_close(w.sum(-1), jnp.ones((2, N, S)), rtol=1e-5, atol=1e-5)
    assert (w < 0).any()


def test_a_query_can_be_read_off_its_weights():
    """So no two queries have the same. Division by the sum makes even q and 2q the same."""
    q, k, v = draw()
    centred = (k - k.mean((1, 2), keepdims=True)).reshape(2, S, N, H).swapaxes(1, 2)
    scores = (weights(q, k) - 1 / S) * S * H**0.5
    read = jnp.einsum("BNTS,BNHS->BTNH", scores, jnp.linalg.pinv(centred))
    chex.assert_trees_all_close(read, flat(q), rtol=1e-5, atol=1e-5)

    divided = lambda q: linear_attention.linear_attention(
        jax.nn.relu(flat(q)), jax.nn.relu(flat(k)), flat(v)
    )[0]
    chex.assert_trees_all_close(divided(2 * q), divided(q), rtol=1e-5, atol=1e-5)
    assert abs(weights(2 * q, k) - weights(q, k)).mean() > 0.1 / S


def test_is_softmax_attention_to_first_order_in_the_scores():
    q, k, v = draw()
    no_kernel = jnp.zeros((2, 3, 3, N, H))

    @jax.jit
    def error(scale):
        """And how much there is beside the mean of the values."""
        softmax = dot_product_attention.dot_product_attention(flat(q * scale), flat(k), flat(v))
        inline = flat(lib.inline_attention(q * scale, k, v, no_kernel))
        return abs(softmax - inline).mean(), abs(inline - flat(v).mean(1, keepdims=True)).mean()

    (large, _), (small, change) = error(0.1), error(0.05)
    assert small < 0.1 * change
    assert 3.5 < large / small < 4.5  # second order


def test_keys_may_move_together():
    """As in softmax attention, and unlike in linear attention."""
    q, k, v = draw()
    kernel = jax.random.normal(KEY, (2, 3, 3, N, H))
    run = lambda k: lib.inline_attention(q, k, v, kernel)
    chex.assert_trees_all_close(run(k + 3), run(k), rtol=1e-5, atol=1e-5)


def test_the_local_term_is_added_by_image_and_channel():
    q, k, v = draw()
    none = jnp.zeros((2, 3, 3, N, H))
    itself = none.at[1, 1, 1, 0, 2].set(1)  # the middle, in one channel of the second image
    local = lib.inline_attention(q, k, v, itself) - lib.inline_attention(q, k, v, none)
    expected = jnp.zeros_like(v).at[1, :, :, 0, 2].set(v[1, :, :, 0, 2])
    chex.assert_trees_all_close(local, expected, atol=1e-5)


def test_kernels_come_from_the_mean_of_the_image_head_by_head():
    module, D = lib.LocalKernel(num_heads=N, head_dim=H, size=3), 6
    x = jax.random.normal(KEY, (2, X, Y, D))
    params = module.init(KEY, x)
    run = jax.jit(lambda x: module.apply(params, x))
    assert run(x).shape == (2, 3, 3, N, H)
    chex.assert_trees_all_close(run(x[:, ::-1]), run(x), rtol=1e-5, atol=1e-5)
    moved = run(x.at[1, ..., 3:].add(1.0)) - run(x)  # the second head's half, of one image
    assert not moved[0].any() and not moved[1, :, :, 0].any() and moved[1, :, :, 1].all()


def test_heads_must_share_the_channels_out():
    module = lib.InlineAttention(num_heads=3, head_dim=4)
    with pytest.raises(ValueError, match="D=8 must be a multiple of num_heads=3"):
        module.init(KEY, jnp.ones((1, 4, 4, 8)))
