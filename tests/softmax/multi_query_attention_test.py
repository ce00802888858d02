import chex
import jax
import pytest

from attnjax.core import masks, registry
from attnjax.softmax.multi_query_attention import MultiQueryAttention

KEY = jax.random.key(0)
N = 4


def test_equals_multi_head_attention_with_its_key_and_value_in_every_head():
    x = jax.random.normal(KEY, (2, 7, 12))
    one = MultiQueryAttention(num_heads=N, head_dim=4)
    many = registry.get("multi_head_attention").module(num_heads=N, head_dim=4)
    params = one.init(KEY, x)
    tile = lambda path, w: w.repeat(N // w.shape[1], 1) if "heads" in str(path) else w
    tiled = jax.tree.map_with_path(tile, params)
    run = lambda module, params: module.apply(params, x, mask=masks.Causal())
    chex.assert_trees_all_close(run(one, params), run(many, tiled), rtol=1e-5, atol=1e-6)


def test_is_gqa_with_one_group():
    x = jax.random.normal(KEY, (2, 7, 12))
    one = MultiQueryAttention(num_heads=N, head_dim=4)
    gqa = registry.get("gqa").module(num_heads=N, head_dim=4, num_kv_heads=1)
    params = one.init(KEY, x)
    chex.assert_trees_all_equal(one.apply(params, x), gqa.apply(params, x))


def test_cache_is_smaller_by_the_number_of_heads():
    state = lambda module: module(num_heads=N, head_dim=4).init_state(2, 9)
    size = lambda module: state(module).k.nbytes + state(module).v.nbytes
    many = registry.get("multi_head_attention").module
    assert size(many) == N * size(MultiQueryAttention)


def test_has_one_key_head_only():
    module = MultiQueryAttention(num_heads=N, head_dim=4, num_kv_heads=2)
    with pytest.raises(ValueError, match="num_kv_heads=2 must be 1"):
        module.init(KEY, jax.random.normal(KEY, (1, 1, 8)))
