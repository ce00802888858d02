"""Only what is particular to BiFormer; the rest is tests/conformance_test.py."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit
from attnjax.sparse import biformer as lib
from tests import cost
from tests.sparse import helpers


def example(X, Y, N=2, H=4):
    return helpers.normal(3, 2, X, Y, N, H)


def flat(x):
    return x.reshape(x.shape[0], -1, *x.shape[3:])


@pytest.mark.parametrize("shape", [(6, 6), (7, 5)])
def test_all_regions_are_full_attention(shape):
    q, k, v = example(*shape)
    w = helpers.weights(flat(q), flat(k), is_causal=False)
    full = np.einsum("BNTS,BSNV->BTNV", w, flat(v)).reshape(v.shape)
    actual = helpers.program(lib.biformer, regions=3, topk=9)(q, k, v)
    chex.assert_trees_all_close(actual, full, rtol=1e-5, atol=1e-6)


def test_weights_are_on_the_tokens_of_the_best_regions_of_each_region():
    q, k, v = example(7, 5)  # regions of 3 by 2 tokens; the last ones have fewer
    matrix = functools.partial(edit.matrix, lib.biformer)
    w = helpers.program(matrix, regions=3, topk=2)(q, k, v)
    region = np.array([x // 3 * 3 + y // 2 for x in range(7) for y in range(5)])
    for b in range(2):
        mean = lambda x, r, b=b: flat(x)[b, region == r].mean(0).reshape(-1)
        for r in range(9):
            best = np.argsort([-mean(q, r) @ mean(k, s) for s in range(9)])[:2]
            seen = np.isin(region, best)
            assert (w[b][:, region == r][..., seen] > 0).all()
            assert not w[b][:, region == r][..., ~seen].any()
    chex.assert_trees_all_close(w.sum(-1), np.ones_like(w[..., 0]), rtol=1e-5)


def test_finds_a_far_region_in_every_image():
    """Keys that one corner looks for are planted in the opposite one."""
    images = 40
    sign = helpers.normal(images, 1, 1, 1, 8)
    q, k = helpers.normal(2, images, 12, 12, 1, 8, seed=1)
    q[:, :3, :3] += 2 * sign
    k[:, 9:, 9:] += 2 * sign
    v = np.zeros((images, 12, 12, 1, 1), np.float32)
    v[:, 9:, 9:] = 1.0
    o = helpers.program(lib.biformer, regions=4, topk=2)(q, k, v)
    assert (o[:, :3, :3].mean((1, 2, 3, 4)) > 0.5).mean() >= 0.95


def test_a_kernel_of_one_tap_adds_the_values_themselves():
    q, k, v = example(6, 6)
    run = helpers.program(lib.biformer, regions=3, topk=2)
    kernel = np.zeros((3, 3, 2, 4), np.float32)
    kernel[1, 1] = 2.0
    chex.assert_trees_all_close(run(q, k, v, kernel), run(q, k, v) + 2 * v, rtol=1e-5, atol=1e-6)


def test_costs_what_the_chosen_regions_cost():
    def count(topk):
        args = [jax.ShapeDtypeStruct((1, 28, 28, 1, 32), jnp.float32)] * 3
        fn = functools.partial(lib.biformer, regions=7, topk=topk)
        return cost.operations(jax.grad(lambda *x: fn(*x).sum(), (0, 1, 2)), *args)

    assert count(2) < 0.07 * count(49) and 1.7 < count(8) / count(4) < 2.05


def test_refuses_what_it_cannot_do():
    q, k, v = (jnp.asarray(x) for x in example(4, 4))
    for options in (dict(regions=0), dict(topk=0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            lib.biformer(q, k, v, **options)
    with pytest.raises(ValueError, match="must be of the same grid"):
        # users run without the annotations' checks
        inspect.unwrap(lib.biformer)(q, k[:, :3], v[:, :3])
