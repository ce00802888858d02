"""Only what is particular to BAM; the rest is tests/conformance_test.py."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.routed import bam as lib

KEY = jax.random.key(0)
T, D, N, H, E = 7, 12, 2, 8, 3
SIZES = dict(head_dim=H, mlp_dim=10, rotary_base=50.0)
seed = lib.BamBlock(num_heads=N, num_experts=1, **SIZES)
own = lib.BamBlock(num_heads=N * E, num_experts=E, topk=2, **SIZES)
shared = lib.BamBlock(num_heads=N * E, num_kv_heads=N, num_experts=E, topk=2, **SIZES)
x = np.random.default_rng(0).normal(size=(2, T, D)).astype(np.float32)


@functools.cache
def seeds():
    shapes = jax.tree.map(lambda x: (E, *x.shape), jax.eval_shape(seed.init, KEY, x))
    draw = np.random.default_rng(1).normal
    one = lambda shape: (draw(size=shape) / 3).astype(np.float32)
    every = jax.tree.map(one, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return tuple(jax.tree.map(lambda p, i=i: p[i], every) for i in range(E))


def apply(block, params, x):
    return block.apply(params, x, mask=masks.Causal())


def names(path):
    return {entry.key for entry in path}


def only(params, expert):
    """Parameters with routers that send all to one expert, by a feature that is never negative."""
    one = lambda leaf: jnp.zeros_like(leaf).at[0, expert].set(99.0)
    route = lambda path, leaf: one(leaf) if "router" in str(path) else leaf
    return jax.tree.map_with_path(route, params)


@jax.jit
def outputs(seeds, x, expert):
    """Of each seed; and of the upcycled block with any routers, and with routers to one expert.

    Then the block with keys and values that are shared.
    """
    mixed = lib.upcycle(seeds, KEY)
    merged = lib.upcycle(seeds, KEY, keys_and_values="shared")
    each = [apply(seed, params, x) for params in seeds]
    run = lambda params: apply(own, params, x)
    return each, run(mixed), run(only(mixed, expert)), apply(shared, merged, x)


def test_copies_of_one_model_are_that_model():
    """Whatever the routers say, and whether or not they share keys and values."""
    (expected, *_), own, _, shared = outputs((seeds()[0],) * E, x, 0)
    chex.assert_trees_all_close((own, shared), (expected,) * 2, rtol=1e-5, atol=1e-5)


def test_each_expert_is_a_model_that_was_upcycled():
    params = jax.tree.map(np.copy, seeds())
    constant = x.copy()
    constant[..., 0] = 3.0
    for params_of_one in params:
        scale = params_of_one["params"]["norm"]["scale"]
        scale[:] = seeds()[0]["params"]["norm"]["scale"]  # one norm, of which routers see 0
        scale[0] = 1.0
    for expert in range(E):
        each, _, actual, _ = outputs(params, constant, expert)
        chex.assert_trees_all_close(actual, each[expert], rtol=1e-5, atol=1e-5)


def test_what_is_not_an_expert_is_averaged_and_routers_are_new():
    first = jax.tree.map(np.abs, seeds()[0])
    second = jax.tree.map(lambda x: x + 2, first)
    merge = functools.partial(lib.upcycle, keys_and_values="shared")
    both = jax.jit(lambda seeds: [merge(seeds, jax.random.key(i)) for i in range(2)])
    params, other = (x["params"] for x in jax.device_get(both([first, second])))
    at = lambda tree: (tree["norm"]["scale"], tree["attention"]["key"]["heads"]["kernel"])
    expected = jax.tree.map(lambda x: x + 1, at(first["params"]))
    chex.assert_trees_all_close(at(params), expected, rtol=1e-6)
    for of in (lambda p: p["router"], lambda p: p["attention"]["router"]):
        kernel = of(params)["dense"]["kernel"]
        assert kernel.shape == (D, 2) and (kernel != of(other)["dense"]["kernel"]).all()
    two = (params["router"], params["attention"]["router"])
    assert (two[0]["dense"]["kernel"] != two[1]["dense"]["kernel"]).all()


def test_experts_that_agree_on_keys_and_values_may_share_them():
    """And then the cache is as small as that of one expert."""
    common = lambda path, leaf, first: first if {"key", "value"} & names(path) else leaf
    alike = tuple(jax.tree.map_with_path(common, params, seeds()[0]) for params in seeds())
    _, own, _, shared = outputs(alike, x, 0)
    chex.assert_trees_all_close(own, shared, rtol=1e-5, atol=1e-5)
    size = lambda **options: (
        jax.eval_shape(lambda: lib.Bam(head_dim=H, **options).init_state(2, 9)).k.size
    )
    together = size(num_heads=N * E, num_experts=E, num_kv_heads=N)
    assert together == size(num_heads=N, num_experts=1)
    assert size(num_heads=N * E, num_experts=E) == E * together


@pytest.mark.parametrize("block, kind", [(own, "own"), (shared, "shared")])
def test_every_parameter_learns_and_a_token_asks_topk_experts_but_all_of_attention(block, kind):
    @jax.jit
    def gradients(seeds, x):
        params = lib.upcycle(seeds, KEY, keys_and_values=kind)
        loss = lambda params, x: (block.apply(params, x[None]) ** 2).mean()
        return jax.vmap(jax.grad(loss), (None, 0))(params, x)

    # one sequence, and one whose tokens are all alike: they ask as one
    grads = jax.device_get(gradients(seeds(), np.stack([x[0], x[1, :1].repeat(T, 0)])))
    shapes = jax.tree.map(lambda x: (2, *x.shape), jax.eval_shape(block.init, KEY, x))
    assert jax.tree.map(np.shape, grads) == shapes
    for path, grad in jax.tree.leaves_with_path(grads):
        assert np.isfinite(grad).all() and grad[0].any(), jax.tree_util.keystr(path)
    asked = grads["params"]["attention"]["out"]["merge"]["kernel"][1].any((1, 2))
    assert asked.all() and grads["params"]["up"]["table"][1].any((1, 2)).sum() == 2


def test_wrong_arguments():
    args = jax.eval_shape(lambda: lib.SPEC.example(KEY, T))
    wrong = args | dict(logits=jax.ShapeDtypeStruct((2, T, 4), "float32"))
    with pytest.raises(ValueError, match="6 heads must be a multiple of the 4 experts"):
        jax.eval_shape(lambda args: lib.bam(**args), wrong)
    for options in (dict(num_experts=4), dict(num_experts=2, num_kv_heads=2)):
        with pytest.raises(ValueError, match="must divide 6 heads"):
            jax.eval_shape(lib.Bam(num_heads=6, head_dim=H, **options).init, KEY, x)
    with pytest.raises(ValueError, match="keys_and_values='mine' must be one of"):
        inspect.unwrap(lib.upcycle)(seeds(), KEY, keys_and_values="mine")
