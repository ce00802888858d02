"""The shape around a state, by a running sum of tokens that are weighted by their number."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import layers, masks, recurrent, registry

X = jax.random.normal(jax.random.key(0), (2, 7, 3))


def add_up(x, *, mask=None, initial_state=0.0, return_state=False):
    for part in masks.select(mask, masks.Causal, masks.Valid, by="add_up")[1]:
        x = jnp.where(part.keys[..., None], x, 0)
    sums = initial_state + jnp.cumsum(x, 1)
    return (sums, sums[:, -1:]) if return_state else sums


class Sums(recurrent.Recurrent):
    fn: Callable[..., jax.Array] = add_up

    def setup(self):
        self.attend = layers.Attend(self.fn)
        self.out = lambda o, features: o[..., :features]

    def _memory(self, batch):
        return jnp.zeros((batch, 1, 3))

    def _project(self, x):
        return (x,)


class Weighted(Sums):
    def _before(self, batch):
        return jnp.zeros((), jnp.int32)

    def _project_after(self, x, before, mask):
        after = before + jnp.arange(1, x.shape[1] + 1)
        return (x * after[None, :, None],), after[-1]

    def _gated(self, o, x):
        return o + 10 * x


def expected(kind, x):
    if kind is Sums:
        return jnp.cumsum(x, 1)
    return jnp.cumsum(x * jnp.arange(1, 8)[None, :, None], 1) + 10 * x


each = pytest.mark.parametrize("kind", [Sums, Weighted])


@each
def test_the_whole_is_projected_mixed_and_gated(kind):
    module = kind(num_heads=1, head_dim=3)
    chex.assert_trees_all_close(module.apply({}, X), expected(kind, X), rtol=1e-5, atol=1e-5)
    valid = jnp.arange(7)[None] < jnp.array([[7], [4]])
    masked = module.apply({}, X, mask=masks.Causal() & masks.Valid(valid))
    chex.assert_trees_all_close(masked[0], expected(kind, X)[0], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(masked[1, :4], expected(kind, X)[1, :4], rtol=1e-5, atol=1e-5)
    assert jnp.abs(masked - expected(kind, X))[1, 4:].min() > 1e-4


@each
def test_pieces_hand_on_what_fn_and_projections_need(kind):
    module, ys = kind(num_heads=1, head_dim=3), []
    state = module.apply({}, 2, 7, method="init_state")
    for piece in (X[:, :1], X[:, 1:5], X[:, 5:]):
        state, y = module.apply({}, state, piece, method="extend")
        ys.append(y)
    chex.assert_trees_all_close(jnp.concatenate(ys, 1), expected(kind, X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["retention", "delta_net", "hgrn", "hedgehog"])
def test_a_state_of_any_length_has_one_size(name):
    module = registry.get(name).module(num_heads=2, head_dim=4)
    start = lambda length: module.apply({}, 1, length, method="init_state")
    chex.assert_trees_all_equal_shapes(start(8), start(8192))
