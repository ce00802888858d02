"""Only what is particular to iLLaMA; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import edit, masks
from attnjax.ops import dot_product_attention as ops
from attnjax.softmax import illama as lib

KEY = jax.random.key(0)
T = 9
ARGS = lib.SPEC.example(KEY, T)


def test_is_bidirectional_where_fully_soft():
    expected = ops.dot_product_attention(**ARGS)
    chex.assert_trees_all_close(lib.illama(**ARGS, softness=1.0), expected, atol=1e-6)


def test_is_linear_in_the_softness_and_so_is_its_gradient():
    run = lambda softness: lib.illama(**ARGS, softness=softness)
    o, slope = jax.jit(lambda a: jax.jvp(run, (a,), (1.0,)))(0.25)
    soft, hard = run(1.0), run(0.0)
    chex.assert_trees_all_close(o, hard + 0.25 * (soft - hard), atol=1e-6)
    chex.assert_trees_all_close(slope, soft - hard, atol=1e-6)
    grad = jax.jit(jax.grad(lambda a: run(a).sum()))(jnp.float32(0))
    chex.assert_trees_all_close(grad, (soft - hard).sum(), rtol=1e-4)


@pytest.mark.parametrize(("softness", "rank"), [(1.0, 1), (0.5, T), (0.0, T)])
def test_a_mask_raises_the_rank_of_a_map_of_equal_weights(softness, rank):
    w = edit.matrix(lib.illama, 0 * ARGS["q"], ARGS["k"], ARGS["v"], softness=softness)
    assert (jnp.linalg.matrix_rank(w) == rank).all()


def test_keys_of_the_future_change_only_the_length_of_an_output():
    """Weights are not normalised again: the future has no value, but a share of the weight."""
    later = jax.random.normal(jax.random.key(1), ARGS["k"].shape)
    future = (jnp.arange(T) >= 5)[None, :, None, None]
    other = ARGS | dict(k=jnp.where(future, later, ARGS["k"]), v=jnp.where(future, 9.0, ARGS["v"]))
    ratio = lib.illama(**other)[:, :5] / lib.illama(**ARGS)[:, :5]
    one = jnp.broadcast_to(ratio[..., :1], ratio.shape)
    chex.assert_trees_all_close(ratio, one, rtol=1e-4)
    assert (jnp.abs(one - 1) > 1e-3).all()
    causal = [lib.illama(**x, mask=masks.Causal())[:, :5] for x in (other, ARGS)]
    chex.assert_trees_all_close(*causal, atol=1e-6)


def test_softness_changes_nothing_under_a_causal_mask():
    a, b = (lib.illama(**ARGS, softness=a, mask=masks.Causal()) for a in (0.0, 1.0))
    chex.assert_trees_all_close(a, b, atol=1e-6)
    chex.assert_trees_all_close(a, ops.dot_product_attention(**ARGS, mask=masks.Causal()))


def test_only_a_class_token_behind_the_image_takes_values_of_it():
    """In front of the image it keeps a multiple of its own value: the collapse of the paper."""
    w = edit.matrix(lib.illama, *ARGS.values())
    assert (w[:, :, -1] > 0).all() and not w[:, :, 0, 1:].any()
    soft = edit.matrix(lib.illama, *ARGS.values(), softness=0.1)
    assert (soft[:, :, 0] > 0).all()


def test_the_module_takes_the_softness_of_a_step_without_compiling_again():
    module, x = lib.Illama(num_heads=2, head_dim=4), jax.random.normal(KEY, (2, T, 8))
    params = module.init(KEY, x)
    run = jax.jit(lambda a: module.apply(params, x, softness=a))
    hard, soft = run(0.0), run(1.0)
    assert run._cache_size() == 1 and jnp.abs(hard - soft).max() > 0.01
    chex.assert_trees_all_close(hard, module.apply(params, x), atol=1e-6)
    chex.assert_trees_all_close(run(0.5), (hard + soft) / 2, atol=1e-5)
