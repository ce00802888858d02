"""Against numpy's convolution; in pieces; under masks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks, short_conv

KEY = jax.random.key(0)
T = 9
X = jax.random.normal(KEY, (2, T, 2, 3))


def kernel(width):
    return jax.random.normal(jax.random.key(1), (width, 2, 3))


@pytest.mark.parametrize("width", [1, 4, 12])
def test_equals_numpy(width):
    y, _ = short_conv.short_conv(X, kernel(width))
    expected = np.empty(X.shape)
    for b, n, h in np.ndindex(2, 2, 3):
        expected[b, :, n, h] = np.convolve(X[b, :, n, h], kernel(width)[:, n, h])[:T]
    chex.assert_trees_all_close(y, expected.astype(np.float32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("pieces", [(1,) * T, (2, 6, 1)])
def test_pieces_equal_the_whole(width, pieces):
    before, ys = None, []
    for piece in jnp.split(X, np.cumsum(pieces)[:-1], axis=1):
        y, before = short_conv.short_conv(piece, kernel(width), before)
        ys.append(y)
    whole, last = short_conv.short_conv(X, kernel(width))
    chex.assert_trees_all_close((jnp.concatenate(ys, 1), before), (whole, last), rtol=1e-6)


def test_a_document_is_alone():
    mask = masks.Causal() & masks.Segments(jnp.array([[0] * 4 + [1] * 5, [3] * 4 + [2] * 5]))
    packed, _ = short_conv.short_conv(X, kernel(4), mask=mask)
    apart = [short_conv.short_conv(x, kernel(4))[0] for x in (X[:, :4], X[:, 4:])]
    chex.assert_trees_all_close(packed, jnp.concatenate(apart, 1), rtol=1e-5, atol=1e-6)


def test_what_came_before_belongs_to_the_first_document():
    before = jax.random.normal(KEY, (2, 3, 2, 3))
    mask = masks.Segments(jnp.array([[0] * 2 + [1] * 7] * 2))
    y, _ = short_conv.short_conv(X, kernel(4), before, mask=mask)
    first, _ = short_conv.short_conv(X[:, :2], kernel(4), before)
    second, _ = short_conv.short_conv(X[:, 2:], kernel(4))
    chex.assert_trees_all_close(y, jnp.concatenate([first, second], 1), rtol=1e-5, atol=1e-6)


def test_padding_counts_as_zero():
    valid = jnp.ones((2, T), bool).at[0, 3].set(False).at[1, :2].set(False)
    y, last = short_conv.short_conv(X, kernel(4), mask=masks.Valid(valid))
    zeros = jnp.where(valid[..., None, None], X, 0)
    chex.assert_trees_all_equal((y, last), short_conv.short_conv(zeros, kernel(4)))


def test_refuses_what_it_cannot_honour():
    ids = jnp.zeros((2, T), int)
    for mask in (masks.Window(2), masks.Segments(ids, ids)):
        with pytest.raises(NotImplementedError, match="short_conv can't honour"):
            short_conv.short_conv(X, kernel(4), mask=mask)
    with pytest.raises(ValueError, match="width=0 must be at least 1"):
        short_conv.ShortConv(0).init(KEY, X)


def test_projection_is_a_silu_of_the_convolution_of_heads():
    x, module = jax.random.normal(KEY, (2, T, 5)), short_conv.ConvProjection(2, 3)
    variables = module.init(KEY, x)
    w = variables["params"]
    heads = jnp.einsum("BTD,DNH->BTNH", x, w["project"]["heads"]["kernel"])
    y, last = short_conv.short_conv(heads, w["conv"]["kernel"]["table"])
    actual = module.apply(variables, x)
    chex.assert_trees_all_close(actual, (y * jax.nn.sigmoid(y), last), rtol=1e-5, atol=1e-6)
    begin = module.apply(variables, 2, method="init_state")
    chex.assert_trees_all_close(module.apply(variables, x, begin), actual, rtol=1e-6)
