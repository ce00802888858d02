"""Only what is particular to multi-head attention; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.softmax import multi_head_attention as lib

KEY = jax.random.key(0)


def test_zero_queries_average_what_they_see():
    args = lib.SPEC.example(KEY, 7)
    args["q"] = jnp.zeros_like(args["q"])
    o = lib.multi_head_attention(**args, mask=masks.Causal())
    counts = jnp.arange(1, 8)[None, :, None, None]
    chex.assert_trees_all_close(o, jnp.cumsum(args["v"], 1) / counts, rtol=1e-5, atol=1e-6)


def test_a_key_that_matches_best_by_far_is_looked_up():
    """Attention with orthogonal keys and large queries is a dictionary."""
    keys = jnp.eye(8)[None, :, None, :]
    values = jax.random.normal(KEY, (1, 8, 1, 5))
    order = jnp.array([3, 0, 7])
    o = lib.multi_head_attention(1000 * keys[:, order], keys, values)
    chex.assert_trees_all_close(o, values[:, order], rtol=1e-6)


def test_heads_do_not_mix_before_the_output_projection():
    args = lib.SPEC.example(KEY, 6)
    o = lib.multi_head_attention(**args)
    for n in range(4):
        one = {name: x[:, :, n : n + 1] for name, x in args.items()}
        alone = lib.multi_head_attention(**one)
        chex.assert_trees_all_close(alone, o[:, :, n : n + 1], rtol=1e-5, atol=1e-6)


def test_the_scale_keeps_the_variance_of_scores_at_one():
    """Section 3.2.1: products of H independent normal features have variance H."""
    q, k = jax.random.normal(KEY, (2, 1, 512, 1, 64))
    identity = jnp.eye(512)[None, :, None, :]
    w = lib.multi_head_attention(q, k, identity, implementation="dense")
    scores = jnp.log(w) - jnp.log(w).mean(-1, keepdims=True)
    assert 0.9 < float(scores.var()) < 1.1


@pytest.mark.parametrize("T", [100, 700])  # on both sides of where the default changes
def test_both_implementations_are_the_same(T):
    q, k, v = jax.random.normal(KEY, (3, 1, T, 2, 8))
    run = lambda name: lib.multi_head_attention(q, k, v, mask=masks.Causal(), implementation=name)
    dense, blocked, default = jax.jit(lambda: (run("dense"), run("blocked"), run(None)))()
    chex.assert_trees_all_close(blocked, dense, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(default, dense, rtol=1e-5, atol=1e-5)


def test_rotary_attention_depends_on_distances_alone():
    module = lib.MultiHeadAttention(num_heads=2, head_dim=8, rotary_base=100.0)
    x = jax.random.normal(KEY, (1, 4, 16))
    params = module.init(KEY, x)
    later = jnp.concatenate([jnp.zeros((1, 9, 16)), x], 1)
    hidden = masks.Valid((jnp.arange(13) >= 9)[None])
    y = module.apply(params, x, mask=masks.Causal())
    moved = module.apply(params, later, mask=masks.Causal() & hidden)
    chex.assert_trees_all_close(moved[:, 9:], y, rtol=1e-4, atol=1e-5)
    reversed_ = module.apply(params, x[:, ::-1])[:, ::-1]
    assert np.abs(reversed_ - module.apply(params, x)).max() > 1e-3
