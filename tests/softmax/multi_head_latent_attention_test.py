import functools

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.softmax import multi_head_latent_attention as mla
from tests import cost
from tests.cotangents import like

KEY = jax.random.key(0)
B, T, N, H = 2, 7, 3, 4


def module(**options):
    return mla.MultiHeadLatentAttention(num_heads=N, head_dim=H, **options)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_latent_that_holds_every_head_is_multi_head_attention():
    """R = 2 N H and P features that are zero: the latent is all keys and values side by side."""
    q, k, v = normal(3, B, T, N, H)

    @jax.jit
    def every(q, k, v):
        latent = jnp.concatenate([k, v], -1).reshape(B, T, -1)
        latent = jnp.pad(latent, ((0, 0), (0, 0), (0, 2)))
        arrays = q, jnp.zeros((B, T, N, 2)), latent, jnp.eye(2 * N * H).reshape(-1, N, 2 * H)
        run = functools.partial(mla.multi_head_latent_attention, *arrays, mask=masks.Causal())
        expected = ops.dot_product_attention(q, k, v, mask=masks.Causal(), scale=(H + 2) ** -0.5)
        return (run(form="expanded"), run(form="absorbed")), (expected, expected)

    chex.assert_trees_all_close(*every(q, k, v), rtol=1e-5, atol=1e-5)


@jax.jit
def forms(args):
    """Of both forms: the output and every gradient."""

    def run(form):
        fn = functools.partial(mla.multi_head_latent_attention, form=form, mask=masks.Causal())
        out, pull = jax.vjp(lambda args: fn(**args), args)
        return out, pull(jnp.cos(out))

    return run("absorbed"), run("expanded")


def test_absorbed_equals_expanded_in_every_gradient():
    args = jax.device_get(jax.jit(mla.SPEC.example, static_argnums=1)(KEY, 9))
    chex.assert_trees_all_close(*forms(args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("query_rank", [None, 5])
def test_only_the_difference_of_positions_matters(query_rank):
    """Tokens before the sequence that are hidden only move it."""
    latent, x = module(query_rank=query_rank), normal(B, T, 16)
    params = like(jax.eval_shape(latent.init, KEY, x))
    params = jax.tree.map(lambda p: p / 4, jax.device_get(params))
    assert ("compress_query" in params["params"]) == (query_rank is not None)

    @jax.jit
    def both(params, x, seen):
        later = jnp.pad(x, ((0, 0), (5, 0), (0, 0)))
        moved = latent.apply(params, later, mask=masks.Causal() & masks.Valid(seen))[:, 5:]
        return moved, latent.apply(params, x, mask=masks.Causal())

    seen = (np.arange(T + 5) >= 5)[None].repeat(B, 0)
    chex.assert_trees_all_close(*both(params, x, seen), rtol=1e-4, atol=1e-5)


def test_the_cache_holds_rank_and_rotated_key_alone():
    state = jax.eval_shape(lambda: module().init_state(B, 11))
    assert sum(x.size for x in jax.tree.leaves(state)) - 1 == B * 11 * (4 * H + H // 2)
    state = jax.eval_shape(lambda: module(rank=5, rope_dim=6).init_state(B, 11))
    assert sum(x.size for x in jax.tree.leaves(state)) - 1 == B * 11 * (5 + 6)


def test_a_step_expands_no_key():
    wide, x = mla.MultiHeadLatentAttention(num_heads=16, head_dim=8), normal(1, 1, 16)
    params = jax.eval_shape(wide.init, KEY, x)
    state = jax.eval_shape(lambda: wide.init_state(1, 1024))
    step = lambda params, state, x: wide.apply(params, state, x, method="extend")
    cached = 1024 * (32 + 4)
    assert cost.largest_array(step, params, state, x) <= cached < 1024 * 16 * 8


def test_operations_per_byte():
    """Yun et al.: attention to 576 cached numbers by 128 heads, beside multi-head attention."""
    heads = dict(key_dim=128, value_dim=128, cached=2 * 128 * 128)
    assert mla.decode_intensity(128, **heads) == 1.0
    latent = mla.decode_intensity(128, key_dim=576, value_dim=512, cached=576)
    assert round(latent, 1) == 241.8
    batches = [mla.expert_intensity(tokens, num_experts=256, topk=8) for tokens in (256, 2048)]
    assert batches == [8.0, 64.0]


def test_refuses_an_unknown_form(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    with pytest.raises(ValueError, match="form='both' must be one of"):
        run = lambda: mla.multi_head_latent_attention(**mla.SPEC.example(KEY, 2), form="both")
        jax.eval_shape(run)
