import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import edit, masks
from attnjax.ops import dot_product_attention as ops
from attnjax.softmax import nap as lib

KEY = jax.random.key(0)
T = 9
ARGS = lib.SPEC.example(KEY, T)


def nap(**changes):
    return lib.nap(**(ARGS | changes), mask=masks.Causal())


def test_scale_and_offset_of_the_scores_do_not_matter():
    """c (q . (k + d)) = c q . k + c q . d, of which softmax sees the c."""
    q, k, v = (ARGS[name] for name in "qkv")
    shifted = k + jax.random.normal(KEY, (1, 1, 4, 8))
    chex.assert_trees_all_close(nap(q=5 * q, k=shifted)[:, 1:], nap()[:, 1:], rtol=1e-4, atol=1e-4)
    softmax = ops.dot_product_attention
    assert jnp.abs(softmax(5 * q, k, v) - softmax(q, k, v)).max() > 0.1


@pytest.mark.parametrize("causal", [True, False])
def test_weights_have_mean_b_and_deviation_g_over_the_keys_seen(causal):
    q, k, v, gain, bias = ARGS.values()
    seen = jnp.array([True, True, False, True, True, True, True, False, True])
    valid = masks.Valid(seen[None].repeat(2, 0))
    mask = valid & masks.Causal() if causal else valid
    w = edit.matrix(lib.nap, q, k, v, gain, bias, mask=mask)
    visible = masks.dense(mask, T, T)
    assert not jnp.where(visible, 0.0, w).any()
    rows = slice(1, None)  # a single key has no deviation
    mean = w.mean(-1, where=visible)[:, :, rows]
    std = w.std(-1, where=visible)[:, :, rows]
    by_head = lambda x: jnp.broadcast_to(x[None, :, None], mean.shape)
    chex.assert_trees_all_close(mean, by_head(bias), rtol=1e-4)
    chex.assert_trees_all_close(std, by_head(jnp.abs(gain)), rtol=1e-4)


def test_leaves_the_convex_hull_of_the_values():
    q = jnp.ones((1, 1, 1, 1))
    k, v = jnp.array([[1.0, 2, 6], [0, 0.5, 1]])[:, None, :, None, None]
    o = lib.nap(q, k, v, jnp.ones(1), jnp.zeros(1))
    x = jnp.array([-2.0, -1, 3]) / jnp.sqrt(14 / 3)  # 1, 2, 6 less their mean 3
    chex.assert_trees_all_close(o[0, 0, 0, 0], x @ v[0, :, 0, 0], rtol=1e-5)
    assert o > 1 >= ops.dot_product_attention(q, k, v)


def test_far_keys_cost_no_accuracy():
    """Sums of squares would lose the variance of keys that are far from zero; several chunks."""
    q, k, v = jax.random.normal(KEY, (3, 1, 300, 1, 4))
    far, one, zero = 64 * jnp.ones(4)[None, None, None], jnp.ones(1), jnp.zeros(1)
    run = jax.jit(lambda k, fn: fn(q, k, v, one, zero, mask=masks.Causal()), static_argnums=1)
    expected = run(k, lib.SPEC.oracle)
    error = lambda o: jnp.sqrt(jnp.mean((o - expected) ** 2) / jnp.mean(expected**2))
    assert error(run(k + far, lib.nap)) < 1e-4


def test_scores_that_are_all_alike_give_finite_weights():
    """Queries at right angles to all keys: the variance is rounding of either sign."""
    line, across = jnp.linalg.qr(jax.random.normal(KEY, (4, 4)))[0][:2]
    k = jax.random.normal(KEY, (1, T, 1, 1)) * line[None, None, None] * 100
    q = jax.random.normal(KEY, (1, T, 1, 1)) * across[None, None, None] * 100
    assert jnp.isfinite(lib.nap(q, k, k, jnp.ones(1), jnp.ones(1))).all()


def test_documents_are_apart():
    ids = jnp.array([[0, 0, 0, 0, 1, 1, 1, 1, 1]]).repeat(2, 0)
    o = lib.nap(**ARGS, mask=masks.Causal() & masks.Segments(ids))
    of = lambda at: lib.nap(
        **(ARGS | {name: ARGS[name][:, at] for name in "qkv"}), mask=masks.Causal()
    )
    alone = jnp.concatenate([of(slice(4)), of(slice(4, None))], 1)
    chex.assert_trees_all_close(o, alone, rtol=1e-4, atol=1e-4)


def test_the_state_is_of_one_size_and_merges():
    state = lib.Nap(num_heads=3, head_dim=4).init_state
    chex.assert_trees_all_equal_shapes(state(2, 5), state(2, 5000))
    cut = lambda at: ARGS | {name: ARGS[name][:, at] for name in "qkv"}
    options = dict(mask=masks.Causal(), return_state=True)
    first, state = lib.nap(**cut(slice(4)), **options)
    rest, state = lib.nap(**cut(slice(4, None)), initial_state=state, **options)
    whole, expected = lib.nap(**ARGS, **options)
    chex.assert_trees_all_close(jnp.concatenate([first, rest], 1), whole, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(state, expected, rtol=1e-4, atol=1e-4)
    _, at_once = lib.nap(**ARGS, return_state=True)  # the same sums by another way
    chex.assert_trees_all_close(at_once, expected, rtol=1e-4, atol=1e-4)


def test_refuses_what_it_cannot_do():
    _, state = lib.nap(**ARGS, return_state=True)
    with pytest.raises(ValueError, match="initial_state needs a causal mask, which mask=None"):
        lib.nap(**ARGS, initial_state=state)
    with pytest.raises(NotImplementedError, match="Segments only together with Causal"):
        lib.nap(**ARGS, mask=masks.Segments(jnp.zeros((2, T), int)))
