"""Tensor attention: what it becomes, triples that it finds, and how good its polynomial is."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.higher_order.tensor_attention import TensorAttention, tensor_attention
from attnjax.ops import dot_product_attention as ops
from tests import cost
from tests.cotangents import like

KEY = jax.random.key(0)
NAMES = ("q", "k1", "k2", "v1", "v2")


def example(T=9, H=4):
    draw = np.random.default_rng(0).normal(size=(5, 2, T, 2, H))
    return dict(zip(NAMES, draw.astype(np.float32), strict=True))


def test_without_second_keys_it_is_softmax_attention():
    """With gradients; without a mask, and with masks of two kinds, by one program."""
    args = example()
    arrays = args["q"], args["k1"], args["v1"]

    def with_gradients(fn, arrays):
        out, pull = jax.vjp(fn, *arrays)
        return out, pull(jnp.cos(out))

    @jax.jit
    def both(*arrays):
        pairs = []
        for mask in (None, masks.Causal(), masks.Window(2)):
            ones = jnp.ones_like(arrays[1])
            run = lambda q, k, v: tensor_attention(q, k, ones, v, ones, mask=mask)  # noqa: B023
            other = functools.partial(ops.dot_product_attention, mask=mask, scale=1 / 4)
            pairs.append([with_gradients(fn, arrays) for fn in (run, other)])
        return tuple(zip(*pairs, strict=True))

    chex.assert_trees_all_close(*both(*arrays), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("degree", [None, 2])
def test_first_and_second_keys_play_the_same_part(degree):
    q, k1, k2, v1, v2 = example().values()
    run = jax.jit(functools.partial(tensor_attention, mask=masks.Causal(), degree=degree))
    actual, expected = run(q, k2, k1, v2, v1), run(q, k1, k2, v1, v2)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_finds_triples():
    """Two tokens whose sum with a third is 0 mod M: one head of attention to pairs knows them.

    cos of the sum is four products of three, and a last token, of score `limit` with itself, takes
    the weight where no triple reaches 1.
    """
    T, M, limit = 6, 23, 0.98
    x = np.random.default_rng(0).integers(0, M, (8, T))
    angle = 2 * np.pi * x / M
    c, s, zero = np.cos(angle), np.sin(angle), np.zeros((8, T))
    stack = lambda *features: np.stack(features, -1)
    with_last = lambda x, last: np.concatenate([x, np.broadcast_to(last, (8, 1, 5))], 1)
    last = np.array([[[0.0, 0, 0, 0, 1]]])
    q = stack(c, -c, -s, -s, zero + limit) * 5 * 2000
    k1, k2 = with_last(stack(c, s, s, c, zero), last), with_last(stack(c, s, c, s, zero), last)
    v = np.concatenate([np.ones((8, T, 1)), np.zeros((8, 1, 1))], 1)
    arrays = (a[:, :, None].astype(np.float32) for a in (q, k1, k2, v, v))
    found = jax.device_get(jax.jit(tensor_attention)(*arrays))[..., 0, 0]
    sums = x[:, :, None, None] + x[:, None, :, None] + x[:, None, None, :]
    expected = (sums % M == 0).any((2, 3))
    assert 0.2 < expected.mean() < 0.8
    chex.assert_trees_all_close(found, expected.astype(np.float32), atol=1e-3)


def errors(bounds, degrees, T=12):
    """The largest error of the polynomial, by the bound on the entries of q, k1 and k2."""
    random = np.random.default_rng(0)
    draw = random.uniform(-1, 1, (3, 2, T, 2, 4)).astype(np.float32)
    v = random.normal(size=(2, 2, T, 2, 4)).astype(np.float32)

    @jax.jit
    def error(bound, draw, v):
        run = functools.partial(tensor_attention, *(draw * bound), *v)
        exact = run()
        return [jnp.abs(run(degree=degree) - exact).max() for degree in degrees]

    return np.stack([jax.device_get(error(bound, draw, v)) for bound in bounds], 1)


def test_polynomial_is_good_for_small_entries():
    error = errors(bounds=(0.5, 1.0, 1.5, 2.0), degrees=(0, 2, 4))
    assert (np.diff(error, axis=0) < 0).all()  # better with its degree
    assert (np.diff(error, axis=1) > 0).all()  # worse with the entries
    assert error[1, 0] < 1e-3


def test_polynomial_costs_linear_time_and_the_exact_form_cubic():
    def count(T, degree):
        loss = lambda args: tensor_attention(**args, degree=degree).sum()
        return cost.operations(jax.grad(loss), jax.eval_shape(lambda: example(T)))

    assert count(2048, 2) < 2.1 * count(1024, 2)
    assert count(128, None) > 7 * count(64, None)


@pytest.mark.parametrize("mask", [None, masks.Causal()])
def test_polynomial_honours_padding(mask):
    args = example(5)
    wider = ((0, 0), (1, 2), (0, 0), (0, 0))
    padded = {name: np.pad(x, wider, constant_values=9.0) for name, x in args.items()}

    @jax.jit
    def both(padded, args, seen):
        valid = masks.Valid(seen)
        run = functools.partial(tensor_attention, degree=2)
        y = run(**padded, mask=valid if mask is None else valid & mask)
        return y, run(**args, mask=mask)

    seen = ((np.arange(8) >= 1) & (np.arange(8) < 6))[None].repeat(2, 0)
    y, expected = jax.device_get(both(padded, args, seen))
    chex.assert_trees_all_close(y[:, 1:6], expected, rtol=1e-4, atol=1e-5)
    if mask is not None:
        assert not y[:, 0].any()  # sees nothing


def test_streams_with_a_polynomial():
    module = TensorAttention(num_heads=2, head_dim=4, degree=2)
    x = np.random.default_rng(0).normal(size=(2, 7, 8)).astype(np.float32)
    params = like(jax.eval_shape(module.init, KEY, x))
    params = jax.tree.map(lambda p: p / 4, jax.device_get(params))

    @jax.jit
    def both(params, x):
        y = module.apply(params, x, mask=masks.Causal())
        state, ys = module.apply(params, 2, 9, method="init_state"), []
        for piece in jnp.split(x, (4, 5), 1):
            state, part = module.apply(params, state, piece, method="extend")
            ys.append(part)
        return y, jnp.concatenate(ys, 1)

    chex.assert_trees_all_close(*both(params, x), rtol=1e-4, atol=1e-5)


def test_refuses_what_it_cannot_do():
    for degree in (3, -2):
        with pytest.raises(ValueError, match=f"{degree=} must be even and at least 0"):
            jax.eval_shape(lambda x, d=degree: tensor_attention(**x, degree=d), example())
    with pytest.raises(NotImplementedError, match="tensor_attention with a degree can't honour"):
        run = functools.partial(tensor_attention, degree=2, mask=masks.Window(2))
        jax.eval_shape(lambda args: run(**args), example())
