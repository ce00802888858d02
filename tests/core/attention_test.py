import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks, registry
from tests.cotangents import like

KEY = jax.random.key(0)


def module(**options):
    return registry.get("gqa").module(num_heads=4, head_dim=8, **options)


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def begin(model, x):
    params = like(jax.eval_shape(model.init, KEY, x))
    return jax.tree.map(lambda p: p / 4, jax.device_get(params))


def test_rotation_tells_differences_of_positions_and_nothing_else():
    """Tokens that are hidden before all others only move these."""

    @jax.jit
    def run(params, x, seen):
        of = lambda base, x, mask: module(rotary_base=base).apply(params, x, mask=mask)
        later = jnp.pad(x, ((0, 0), (5, 0), (0, 0)))
        after = of(100.0, later, masks.Causal() & masks.Valid(seen))[:, 5:]
        return of(100.0, x, masks.Causal()), after, of(None, x, masks.Causal())

    x, seen = draw(1, 6, 16), (np.arange(11) >= 5)[None]
    params = begin(module(), x)
    rotated, after, plain = jax.device_get(run(params, x, seen))
    chex.assert_trees_all_close(after, rotated, rtol=1e-4, atol=1e-5)
    other, _, swapped = jax.device_get(run(params, x[:, [1, 0, 2, 3, 4, 5]], seen))
    chex.assert_trees_all_close(swapped[:, -1], plain[:, -1], rtol=1e-5, atol=1e-6)
    assert np.abs(rotated - other)[:, -1].max() > 1e-3


def test_cache_is_filled_from_the_front_with_rotated_keys():
    x = draw(2, 5, 16)
    model = module(num_kv_heads=2, rotary_base=100.0, dtype=jnp.bfloat16)

    @jax.jit
    def run(params, x):
        extend = lambda state, x: model.apply(params, state, x, method="extend")[0]
        state = extend(extend(model.init_state(2, 7), x[:, :3]), x[:, 3:])
        return state, extend(model.init_state(2, 7), x)

    state, whole = jax.device_get(run(begin(model, x), x))
    chex.assert_trees_all_close(state, whole, rtol=1e-2)
    assert state.length == 5 and state.k.shape == (2, 7, 2, 8) and state.k.dtype == jnp.bfloat16
    assert state.k[:, :5].any((2, 3)).all() and not state.k[:, 5:].any()


def test_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="num_heads=4 must be a multiple of num_kv_heads=3"):
        jax.eval_shape(module(num_kv_heads=3).init, KEY, draw(1, 1, 8))
