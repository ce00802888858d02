import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import block_sparse_vggt as vggt

KEY = jax.random.key(0)
BLOCKS = dict(block_q=16, block_k=16)


def flat(x):
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def full(q, k, v):
    return ops.dot_product_attention(flat(q), flat(k), flat(v)).reshape(v.shape)


def example(I=4, P=19, N=2, H=8):
    return jax.random.normal(KEY, (3, 2, I, P, N, H))


@pytest.mark.parametrize("options", [dict(tau=1.0), dict(tau=0.0, sparsity=0.0)])
def test_all_blocks_are_full_attention(options):
    def both(fn, *args):
        out, pull = jax.vjp(fn, *args)
        return out, pull(jnp.cos(out))

    run = functools.partial(vggt.block_sparse_vggt, specials=3, **BLOCKS, **options)
    actual, expected = jax.jit(lambda *x: (both(run, *x), both(full, *x)))(*example())
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_special_tokens_see_everything_and_are_seen_by_all():
    q, k, v = example()
    run = jax.jit(functools.partial(vggt.block_sparse_vggt, specials=3, tau=0.0, **BLOCKS))
    o, expected = run(q, k, v), full(q, k, v)
    chex.assert_trees_all_close(o[:, :, :3], expected[:, :, :3], rtol=1e-5, atol=1e-6)
    assert (jnp.abs(o - expected).max((-2, -1))[:, :, 3:] > 1e-3).all(), "patches do not"
    moved = run(q, k, v.at[:, 2, 1].add(1.0))
    assert (jnp.abs(moved - o).max((-2, -1)) > 1e-6).all()


def test_kept_blocks_reach_tau_and_the_least_share():
    q, k, _ = (flat(x) for x in example(P=16))
    means = lambda x: x.reshape(2, 4, 16, 2, 8).mean(2)
    a = jax.nn.softmax(jnp.einsum("BTNH,BSNH->BNTS", means(3 * q), means(3 * k)) / np.sqrt(8))
    kept = {s: vggt.select(3 * q, 3 * k, 0.5, s, 16, 16) for s in (1.0, 0.3, 0.26)}
    assert (jnp.where(kept[1.0], a, 0).sum(-1) >= 0.5).all()
    assert int(kept[1.0].sum(-1).min()) == 1 and int(kept[0.3].sum(-1).min()) == 2
    for mask in kept.values():  # those left out have less than any that is kept
        assert (jnp.where(mask, a, 2).min(-1) >= jnp.where(mask, -1, a).max(-1)).all()


def matches():
    """Eight views of 65 tokens whose blocks of 16 patches each look alike in all views."""
    scene = 7 * jax.nn.one_hot(jnp.arange(64) // 16, 8)
    x = jnp.pad(jnp.tile(scene, (8, 1, 1)), ((0, 0), (1, 0), (0, 0)))
    draw = jax.random.normal(KEY, (3, 1, 8, 65, 1, 8))
    q, k = x[None, None, :, :, None] + 0.1 * draw[:2]
    return q, k, draw[2]


def test_a_quarter_of_the_blocks_finds_the_matches_between_views(monkeypatch):
    q, k, v = matches()
    run = jax.jit(functools.partial(vggt.block_sparse_vggt, specials=1, tau=0.9, **BLOCKS))
    norm = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    cosine = lambda o: jnp.mean((norm(o) * norm(full(q, k, v))).sum(-1))
    kept = vggt.select(*(flat(x[:, :, 1:]) for x in (q, k)), 0.9, 1.0, 16, 16)
    assert 0.2 < kept.mean() <= 0.25
    found = cosine(run(q, k, v))
    random = jax.random.permutation(KEY, kept, axis=-1)
    monkeypatch.setattr(vggt, "select", lambda *_: random)
    guessed = jax.jit(functools.partial(vggt.block_sparse_vggt, specials=1, tau=0.9, **BLOCKS))
    assert found > 0.99 and cosine(guessed(q, k, v)) < 0.9


def test_what_is_not_kept_is_not_read():
    q, k, v = jnp.ones((3, 1, 1100, 1, 8))
    kept = jnp.zeros((1, 1, 9, 18), bool).at[..., 0].set(True)
    k, v = (x.at[:, 64:].set(jnp.nan) for x in (k, v))
    mask = masks.Blocks(kept, 128, 64)
    run = jax.jit(lambda *x: jax.value_and_grad(lambda *x: vggt._attend(*x, mask).sum())(*x))
    value, grad = run(q, k, v, k[:, :5], v[:, :5])
    assert jnp.isfinite(value) and jnp.isfinite(grad).all()


@pytest.mark.parametrize("options", [dict(tau=1.1), dict(sparsity=-0.1), dict(specials=19)])
def test_refuses_what_it_cannot_do(options):
    with pytest.raises(ValueError, match="must"):
        vggt.block_sparse_vggt(*example(), **options)
