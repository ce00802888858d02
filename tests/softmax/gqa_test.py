import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks, registry
from attnjax.softmax import gqa
from tests import cost, training

KEY = jax.random.key(0)
N = 4


def multi_head(**options):
    return registry.get("multi_head_attention").module(num_heads=N, head_dim=8, **options)


def grouped(K, **options):
    return gqa.GQA(num_heads=N, head_dim=8, num_kv_heads=K, **options)


def test_as_many_groups_as_heads_are_multi_head_attention():
    x = jax.random.normal(KEY, (2, 7, 12))
    params = multi_head().init(KEY, x)
    assert gqa.mean_pool_heads(params, num_kv_heads=N).keys() == params.keys()
    run = lambda module: module.apply(params, x, mask=masks.Causal())
    chex.assert_trees_all_equal(run(grouped(N)), run(multi_head()))


@pytest.mark.parametrize("K", [1, 2])
def test_pooling_heads_that_are_equal_loses_nothing(K):
    x = jax.random.normal(KEY, (2, 7, 12))
    few = grouped(K).init(KEY, x)
    names = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    in_all = lambda path, w: w.repeat(N // w.shape[1], 1) if "/heads/" in names(path) else w
    many = jax.tree.map_with_path(in_all, few)
    pooled = gqa.mean_pool_heads({"deep": [many]}, num_kv_heads=K)["deep"][0]
    chex.assert_trees_all_close(pooled, few, rtol=1e-6)
    run = lambda module, params: module.apply(params, x, mask=masks.Causal())
    chex.assert_trees_all_close(run(grouped(K), pooled), run(multi_head(), many), atol=1e-5)


def test_mean_of_a_group_is_a_better_start_than_its_first_head():
    """Section 2.1 and figure 4, on multi-head attention that learned to find the last token."""
    first = lambda params: jax.tree.map(lambda w: w[:, :: w.shape[1] // 2], params)

    def loss(params, key, module):
        x = jax.random.normal(key, (16, 12, 16))
        y = module.apply({"params": params}, x, mask=masks.Causal())
        return jnp.mean((y - jnp.roll(x, 1, 1))[:, 1:] ** 2)

    start = multi_head().init(KEY, jnp.ones((1, 1, 16)))["params"]
    mha = functools.partial(loss, module=multi_head(rotary_base=100.0))
    params = training.fit(mha, start, steps=150, learning_rate=5e-3)
    chosen = params | {name: first(params[name]) for name in ("key", "value")}
    pooled = gqa.mean_pool_heads(params, num_kv_heads=2)
    judge = jax.jit(lambda params: loss(params, KEY, grouped(2, rotary_base=100.0)))
    assert judge(pooled) < 0.95 * judge(chosen)


def test_pools_layers_that_are_stacked():
    kernel = jnp.arange(2.0 * 3 * N * 1).reshape(2, 3, N, 1)
    tree = {name: {"heads": {"kernel": kernel}} for name in ("query", "key", "value")}
    pooled = gqa.mean_pool_heads(tree, num_kv_heads=2)
    chex.assert_trees_all_equal(pooled["query"], tree["query"])
    expected = (kernel[:, :, ::2] + kernel[:, :, 1::2]) / 2
    assert (pooled["key"]["heads"]["kernel"] == expected).all()
    assert (pooled["value"]["heads"]["kernel"] == expected).all()


def test_refuses_what_it_cannot_pool():
    with pytest.raises(ValueError, match="num_kv_heads=3 must divide the 4 heads of key"):
        gqa.mean_pool_heads({"key": {"heads": {"kernel": jnp.ones((2, 4, 1))}}}, num_kv_heads=3)
    with pytest.raises(ValueError, match="params must have"):
        gqa.mean_pool_heads({"mlp": {"kernel": jnp.ones((2, 4))}}, num_kv_heads=2)


def test_cache_grows_with_the_number_of_key_heads():
    size = lambda K: sum(
        x.nbytes for x in (grouped(K).init_state(2, 9).k, grouped(K).init_state(2, 9).v)
    )
    assert size(4) == 2 * size(2) == 4 * size(1)


@pytest.mark.parametrize("implementation", ["dense", "blocked"])
def test_keys_are_not_repeated(implementation):
    """With few queries of many heads, nothing is larger than the keys, forward and backward."""
    q, k = jnp.ones((1, 2, 16, 32)), jnp.ones((1, 512, 2, 32))
    fn = functools.partial(gqa.gqa, implementation=implementation)
    both = jax.grad(lambda q, k, v: fn(q, k, v).sum(), (0, 1, 2))
    assert cost.largest_array(both, q, k, k) <= k.size
