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

KEY = jax.random.key(0)
NAMES = ("q", "k1", "k2", "v1", "v2")


def example(T=9, H=4):
    return dict(zip(NAMES, jax.random.normal(KEY, (5, 2, T, 2, H)), strict=True))


@pytest.mark.parametrize("mask", [None, masks.Causal(), masks.Window(2)])
def test_without_second_keys_it_is_softmax_attention(mask):
    args = example()
    ones = jnp.ones_like(args["k2"])
    run = lambda q, k, v: tensor_attention(q, k, ones, v, ones, mask=mask)
    other = functools.partial(ops.dot_product_attention, mask=mask, scale=1 / 4)
    arrays = args["q"], args["k1"], args["v1"]

    def both(fn):
        out, pull = jax.vjp(fn, *arrays)
        return out, pull(jnp.cos(out))

    chex.assert_trees_all_close(*jax.jit(lambda: (both(run), both(other)))(), rtol=1e-5, atol=1e-5)


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
    x = jax.random.randint(KEY, (8, T), 0, M)
    angle = 2 * jnp.pi * x / M
    c, s, zero = jnp.cos(angle), jnp.sin(angle), jnp.zeros((8, T))
    stack = lambda *features: jnp.stack(features, -1)
    with_last = lambda x, last: jnp.concatenate([x, jnp.broadcast_to(last, (8, 1, 5))], 1)
    last = jnp.array([[[0.0, 0, 0, 0, 1]]])
    q = stack(c, -c, -s, -s, zero + limit) * 5 * 2000
    k1, k2 = with_last(stack(c, s, s, c, zero), last), with_last(stack(c, s, c, s, zero), last)
    v = jnp.concatenate([jnp.ones((8, T, 1)), jnp.zeros((8, 1, 1))], 1)
    found = jax.jit(tensor_attention)(*(a[:, :, None] for a in (q, k1, k2, v, v)))[..., 0, 0]
    sums = x[:, :, None, None] + x[:, None, :, None] + x[:, None, None, :]
    expected = (sums % M == 0).any((2, 3))
    assert 0.2 < expected.mean() < 0.8
    chex.assert_trees_all_close(found, expected.astype(jnp.float32), atol=1e-3)


def errors(bounds, degrees, T=12):
    """The largest error of the polynomial, by the bound on the entries of q, k1 and k2."""
    draw = jax.random.uniform(KEY, (3, 2, T, 2, 4), minval=-1.0)
    v = jax.random.normal(KEY, (2, 2, T, 2, 4))

    @functools.partial(jax.jit, static_argnames="degree")
    def error(bound, degree):
        run = functools.partial(tensor_attention, *(draw * bound), *v)
        return jnp.abs(run(degree=degree) - run()).max()

    return np.array([[error(bound, degree) for bound in bounds] for degree in degrees])


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
    run = jax.jit(functools.partial(tensor_attention, degree=2))
    wider = ((0, 0), (1, 2), (0, 0), (0, 0))
    padded = {name: jnp.pad(x, wider, constant_values=9.0) for name, x in args.items()}
    valid = masks.Valid(jnp.isin(jnp.arange(8), jnp.arange(1, 6))[None].repeat(2, 0))
    y = run(**padded, mask=valid if mask is None else valid & mask)
    chex.assert_trees_all_close(y[:, 1:6], run(**args, mask=mask), rtol=1e-4, atol=1e-5)
    if mask is not None:
        assert not y[:, 0].any()  # sees nothing


def test_streams_with_a_polynomial():
    module = TensorAttention(num_heads=2, head_dim=4, degree=2)
    x = jax.random.normal(KEY, (2, 7, 8))

    @jax.jit
    def both(x):
        y, params = module.init_with_output(KEY, x, mask=masks.Causal())
        state, ys = module.apply(params, 2, 9, method="init_state"), []
        for piece in jnp.split(x, (4, 5), 1):
            state, part = module.apply(params, state, piece, method="extend")
            ys.append(part)
        return y, jnp.concatenate(ys, 1)

    chex.assert_trees_all_close(*both(x), rtol=1e-4, atol=1e-5)


def test_refuses_what_it_cannot_do():
    for degree in (3, -2):
        with pytest.raises(ValueError, match=f"{degree=} must be even and at least 0"):
            tensor_attention(**example(), degree=degree)
    with pytest.raises(NotImplementedError, match="tensor_attention with a degree can't honour"):
        tensor_attention(**example(), degree=2, mask=masks.Window(2))
