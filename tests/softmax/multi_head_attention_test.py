"""Only what is particular to multi-head attention; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.softmax import multi_head_attention as lib
from tests.cotangents import like

KEY = jax.random.key(0)


run = jax.jit(lib.multi_head_attention, static_argnames=("mask", "implementation"))
CAUSAL = masks.Causal()


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_zero_queries_average_what_they_see():
    q, k, v = normal(3, 2, 7, 4, 8)
    o = run(0 * q, k, v, mask=CAUSAL)
    counts = np.arange(1, 8, dtype=np.float32)[None, :, None, None]
    chex.assert_trees_all_close(o, np.cumsum(v, 1) / counts, rtol=1e-5, atol=1e-6)


def test_a_key_that_matches_best_by_far_is_looked_up():
    """Attention with orthogonal keys and large queries is a dictionary."""
    keys, values = np.eye(8, dtype=np.float32)[None, :, None, :], normal(1, 8, 1, 5)
    order = [3, 0, 7]
    o = run(1000 * keys[:, order], keys, values)
    chex.assert_trees_all_close(o, values[:, order], rtol=1e-6)


def test_heads_do_not_mix_before_the_output_projection():
    args = normal(3, 2, 7, 4, 8)
    o = jax.device_get(run(*args))
    for n in range(4):
        one = slice(n, n + 1)
        alone = run(*args[:, :, :, one])
        chex.assert_trees_all_close(alone, o[:, :, one], rtol=1e-5, atol=1e-6)


def test_the_scale_keeps_the_variance_of_scores_at_one():
    """Section 3.2.1: products of H independent normal features have variance H."""
    q, k = normal(2, 1, 512, 1, 64)
    identity = np.eye(512, dtype=np.float32)[None, :, None, :]
    w = np.log(jax.device_get(run(q, k, identity, implementation="dense")))
    assert 0.9 < float((w - w.mean(-1, keepdims=True)).var()) < 1.1


@pytest.mark.parametrize("T", [100, 700])  # on both sides of where the default changes
def test_both_implementations_are_the_same(T):
    @jax.jit
    def every(q, k, v):
        of = lambda name: lib.multi_head_attention(q, k, v, mask=CAUSAL, implementation=name)
        return of("dense"), of("blocked"), of(None)

    dense, blocked, default = every(*normal(3, 1, T, 2, 8))
    chex.assert_trees_all_close(blocked, dense, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(default, dense, rtol=1e-5, atol=1e-5)


def test_rotary_attention_depends_on_distances_alone():
    module = lib.MultiHeadAttention(num_heads=2, head_dim=8, rotary_base=100.0)
    x = normal(1, 4, 16)
    params = like(jax.eval_shape(module.init, KEY, x))
    params = jax.tree.map(lambda p: p / 4, jax.device_get(params))

    @jax.jit
    def run(params, x, hidden):
        later = jnp.concatenate([jnp.zeros((1, 9, 16)), x], 1)
        moved = module.apply(params, later, mask=CAUSAL & masks.Valid(hidden))[:, 9:]
        y = module.apply(params, x, mask=CAUSAL)
        return moved, y, module.apply(params, x[:, ::-1])[:, ::-1], module.apply(params, x)

    moved, y, back, whole = jax.device_get(run(params, x, (np.arange(13) >= 9)[None]))
    chex.assert_trees_all_close(moved, y, rtol=1e-4, atol=1e-5)
    assert np.abs(back - whole).max() > 1e-3
