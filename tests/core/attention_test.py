import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks, registry

KEY = jax.random.key(0)


def module(**options):
    return registry.get("gqa").module(num_heads=4, head_dim=8, **options)


def moved(base, x, params):
    """The outputs for x, and for x after five tokens that are hidden."""
    run = lambda x, mask: module(rotary_base=base).apply(params, x, mask=mask)
    valid = masks.Valid((jnp.arange(x.shape[1] + 5) >= 5)[None])
    after = run(jnp.pad(x, ((0, 0), (5, 0), (0, 0))), masks.Causal() & valid)[:, 5:]
    return run(x, masks.Causal()), after


def test_rotation_tells_differences_of_positions_and_nothing_else():
    x = jax.random.normal(KEY, (1, 6, 16))
    params = module().init(KEY, x)
    chex.assert_trees_all_close(*moved(100.0, x, params), rtol=1e-4, atol=1e-5)
    swapped = x[:, jnp.array([1, 0, 2, 3, 4, 5])]
    last = lambda x, base: moved(base, x, params)[0][:, -1]
    chex.assert_trees_all_close(last(x, None), last(swapped, None), rtol=1e-5, atol=1e-6)
    assert jnp.abs(last(x, 100.0) - last(swapped, 100.0)).max() > 1e-3


def test_cache_is_filled_from_the_front_with_rotated_keys():
    x = jax.random.normal(KEY, (2, 5, 16))
    model = module(num_kv_heads=2, rotary_base=100.0, dtype=jnp.bfloat16)
    params = model.init(KEY, x)
    extend = jax.jit(lambda state, x: model.apply(params, state, x, method="extend")[0])
    state = extend(extend(model.init_state(2, 7), x[:, :3]), x[:, 3:])
    whole = extend(model.init_state(2, 7), x)
    chex.assert_trees_all_close(state, whole, rtol=1e-2)
    assert state.length == 5 and state.k.shape == (2, 7, 2, 8) and state.k.dtype == jnp.bfloat16
    assert state.k[:, :5].any((2, 3)).all() and not state.k[:, 5:].any()


def test_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="num_heads=4 must be a multiple of num_kv_heads=3"):
        module(num_kv_heads=3).init(KEY, jnp.ones((1, 1, 8)))
