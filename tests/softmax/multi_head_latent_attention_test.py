import functools

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.softmax import multi_head_latent_attention as mla
from tests import cost

KEY = jax.random.key(0)
B, T, N, H = 2, 7, 3, 4


def module(**options):
    return mla.MultiHeadLatentAttention(num_heads=N, head_dim=H, **options)


def test_a_latent_that_holds_every_head_is_multi_head_attention():
    """R = 2 N H and P features that are zero: the latent is all keys and values side by side."""
    q, k, v = jax.random.normal(KEY, (3, B, T, N, H))
    latent = jnp.concatenate([k, v], -1).reshape(B, T, -1)
    latent = jnp.pad(latent, ((0, 0), (0, 0), (0, 2)))
    up = jnp.eye(2 * N * H).reshape(2 * N * H, N, 2 * H)
    zeros = jnp.zeros((B, T, N, 2))
    run = functools.partial(
        mla.multi_head_latent_attention, q, zeros, latent, up, mask=masks.Causal()
    )
    expected = ops.dot_product_attention(q, k, v, mask=masks.Causal(), scale=(H + 2) ** -0.5)
    for form in ("expanded", "absorbed"):
        chex.assert_trees_all_close(run(form=form), expected, rtol=1e-5, atol=1e-5)


def test_absorbed_equals_expanded_in_every_gradient():
    args = mla.SPEC.example(KEY, 9)

    def run(form):
        fn = functools.partial(mla.multi_head_latent_attention, form=form, mask=masks.Causal())
        out, pull = jax.vjp(lambda args: fn(**args), args)
        return out, pull(jnp.cos(out))

    actual, expected = jax.jit(lambda: (run("absorbed"), run("expanded")))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("query_rank", [None, 5])
def test_only_the_difference_of_positions_matters(query_rank):
    """Tokens before the sequence that are hidden only move it."""
    x = jax.random.normal(KEY, (B, T, 16))
    params = module(query_rank=query_rank).init(KEY, x)
    assert ("compress_query" in params["params"]) == (query_rank is not None)
    run = jax.jit(lambda x, mask: module(query_rank=query_rank).apply(params, x, mask=mask))
    valid = masks.Valid((jnp.arange(T + 5) >= 5)[None].repeat(B, 0))
    moved = run(jnp.pad(x, ((0, 0), (5, 0), (0, 0))), masks.Causal() & valid)[:, 5:]
    chex.assert_trees_all_close(moved, run(x, masks.Causal()), rtol=1e-4, atol=1e-5)


def test_the_cache_holds_rank_and_rotated_key_alone():
    state = module().init_state(B, 11)
    assert sum(x.size for x in jax.tree.leaves(state)) - 1 == B * 11 * (4 * H + H // 2)
    state = module(rank=5, rope_dim=6).init_state(B, 11)
    assert sum(x.size for x in jax.tree.leaves(state)) - 1 == B * 11 * (5 + 6)


def test_a_step_expands_no_key():
    wide, x = mla.MultiHeadLatentAttention(num_heads=16, head_dim=8), jnp.ones((1, 1, 16))
    params = jax.jit(wide.init)(KEY, x)
    step = lambda state: wide.apply(params, state, x, method="extend")
    cached = 1024 * (32 + 4)
    assert cost.largest_array(step, wide.init_state(1, 1024)) <= cached < 1024 * 16 * 8


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
        mla.multi_head_latent_attention(**mla.SPEC.example(KEY, 2), form="both")
