"""Only what is particular to BAM; the rest is tests/conformance_test.py."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks
from attnjax.routed import bam as lib

KEY = jax.random.key(0)
T, D, N, H, E = 7, 12, 2, 8, 3
SIZES = dict(head_dim=H, mlp_dim=10, rotary_base=50.0)
seed = lib.BamBlock(num_heads=N, num_experts=1, **SIZES)
own = lib.BamBlock(num_heads=N * E, num_experts=E, topk=2, **SIZES)
shared = lib.BamBlock(num_heads=N * E, num_kv_heads=N, num_experts=E, topk=2, **SIZES)
both = pytest.mark.parametrize("block, kind", [(own, "own"), (shared, "shared")])
x = jax.random.normal(KEY, (2, T, D))


@functools.cache
def seeds():
    init = jax.jit(seed.init)
    return tuple(init(jax.random.key(i), x) for i in range(E))


def run(block, params):
    return jax.jit(functools.partial(block.apply, mask=masks.Causal()))(params, x)


@both
def test_copies_of_one_model_are_that_model(block, kind):
    """Whatever the routers say."""
    one, expected = seeds()[0], run(seed, seeds()[0])
    for i in range(2):
        params = lib.upcycle([one] * E, jax.random.key(i), keys_and_values=kind)
        chex.assert_trees_all_close(run(block, params), expected, rtol=1e-5, atol=1e-5)


def only(params, expert):
    """Parameters with routers that send all to one expert, by a feature that is never negative."""
    one = lambda leaf: jnp.zeros_like(leaf).at[0, expert].set(99.0)
    route = lambda path, leaf: one(leaf) if "router" in str(path) else leaf
    return jax.tree.map_with_path(route, params)


@pytest.mark.parametrize("expert", range(E))
def test_each_expert_is_a_model_that_was_upcycled(expert):
    params = only(lib.upcycle(seeds(), KEY), expert)
    constant = x.at[..., 0].set(3.0)
    apply = lambda block, params: block.apply(params, constant, mask=masks.Causal())
    actual, expected = jax.jit(lambda: (apply(own, params), apply(seed, seeds()[expert])))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_an_expert_is_averaged_and_routers_are_new():
    first, second = seeds()[0], jax.tree.map(lambda x: x + 2, seeds()[0])
    merge = functools.partial(lib.upcycle, [first, second], keys_and_values="shared")
    params, other = merge(KEY)["params"], merge(jax.random.key(1))["params"]
    chex.assert_trees_all_close(params["norm"]["scale"], jnp.full(D, 2.0))
    key = first["params"]["attention"]["key"]["heads"]["kernel"]
    chex.assert_trees_all_close(params["attention"]["key"]["heads"]["kernel"], key + 1, rtol=1e-6)
    for of in (lambda p: p["router"], lambda p: p["attention"]["router"]):
        kernel = of(params)["dense"]["kernel"]
        assert kernel.shape == (D, 2) and (kernel != of(other)["dense"]["kernel"]).all()
    two = (params["router"], params["attention"]["router"])
    assert (two[0]["dense"]["kernel"] != two[1]["dense"]["kernel"]).all()


def test_experts_that_agree_on_keys_and_values_may_share_them():
    """And then the cache is as small as that of one expert."""
    common = lambda path, leaf, first: first if {"key", "value"} & names(path) else leaf
    names = lambda path: {entry.key for entry in path}
    alike = [jax.tree.map_with_path(common, params, seeds()[0]) for params in seeds()]
    outputs = [
        run(block, lib.upcycle(alike, KEY, keys_and_values=kind))
        for block, kind in ((own, "own"), (shared, "shared"))
    ]
    chex.assert_trees_all_close(*outputs, rtol=1e-5, atol=1e-5)
    size = lambda **options: lib.Bam(head_dim=H, **options).init_state(2, 9).k.size
    together = size(num_heads=N * E, num_experts=E, num_kv_heads=N)
    assert together == size(num_heads=N, num_experts=1)
    assert size(num_heads=N * E, num_experts=E) == E * together


def test_every_expert_of_attention_is_asked_and_topk_of_the_others():
    params = lib.upcycle(seeds(), KEY)
    loss = lambda params: (own.apply(params, x[:1, :1]) ** 2).sum()
    grads = jax.jit(jax.grad(loss))(params)["params"]
    asked = grads["attention"]["out"]["merge"]["kernel"].any((1, 2))
    assert asked.all() and grads["up"]["table"].any((1, 2)).sum() == 2


@both
def test_every_parameter_of_a_block_learns(block, kind):
    params = lib.upcycle(seeds(), KEY, keys_and_values=kind)
    grads = jax.jit(jax.grad(lambda params: (block.apply(params, x) ** 2).mean()))(params)
    chex.assert_trees_all_equal_shapes(grads, jax.eval_shape(block.init, KEY, x))
    for path, grad in jax.tree.leaves_with_path(grads):
        assert jnp.isfinite(grad).all() and grad.any(), jax.tree_util.keystr(path)


def test_wrong_arguments():
    args = lib.SPEC.example(KEY, T)
    with pytest.raises(ValueError, match="6 heads must be a multiple of the 4 experts"):
        lib.bam(**(args | dict(logits=jnp.zeros((2, T, 4)))))
    for options in (dict(num_experts=4), dict(num_experts=2, num_kv_heads=2)):
        with pytest.raises(ValueError, match="must divide 6 heads"):
            lib.Bam(num_heads=6, head_dim=H, **options).init(KEY, x)
    with pytest.raises(ValueError, match="keys_and_values='mine' must be one of"):
        inspect.unwrap(lib.upcycle)(seeds(), KEY, keys_and_values="mine")
