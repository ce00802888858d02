import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import block_sparse_vggt as vggt
from tests.sparse import helpers

BLOCKS = dict(block_q=16, block_k=16)


def flat(x):
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def full(q, k, v):
    return ops.dot_product_attention(flat(q), flat(k), flat(v)).reshape(v.shape)


def example(I=4, P=19, N=2, H=8):
    return tuple(helpers.normal(3, 2, I, P, N, H))


@pytest.mark.parametrize("options", [dict(tau=1.0), dict(tau=0.0, sparsity=0.0)])
def test_all_blocks_are_full_attention(options):
    run = functools.partial(vggt.block_sparse_vggt, specials=3, **BLOCKS, **options)
    helpers.assert_same(run, full, example())


def test_special_tokens_see_everything_and_are_seen_by_all():
    q, k, v = example()
    run = functools.partial(vggt.block_sparse_vggt, specials=3, tau=0.0, **BLOCKS)
    both = helpers.program(lambda *args: (run(*args), full(*args)))
    o, expected = both(q, k, v)
    chex.assert_trees_all_close(o[:, :, :3], expected[:, :, :3], rtol=1e-5, atol=1e-6)
    assert (np.abs(o - expected).max((-2, -1))[:, :, 3:] > 1e-3).all(), "patches do not"
    v[:, 2, 1] += 1.0
    assert (np.abs(both(q, k, v)[0] - o).max((-2, -1)) > 1e-6).all()


def test_kept_blocks_reach_tau_and_the_least_share():
    q, k, _ = (flat(x) for x in example(P=16))
    means = lambda x: 3 * x.reshape(2, 4, 16, 2, 8).mean(2)
    a = helpers.weights(means(q), means(k), is_causal=False)
    shares = (1.0, 0.3, 0.26)
    select = lambda q, k: [vggt.select(3 * q, 3 * k, 0.5, share, 16, 16) for share in shares]
    kept = dict(zip(shares, helpers.program(select)(q, k), strict=True))
    assert (np.where(kept[1.0], a, 0).sum(-1) >= 0.5).all()
    assert kept[1.0].sum(-1).min() == 1 and kept[0.3].sum(-1).min() == 2
    for mask in kept.values():  # those left out have less than any that is kept
        assert (np.where(mask, a, 2).min(-1) >= np.where(mask, -1, a).max(-1)).all()


def matches():
    """Eight views of 65 tokens whose blocks of 16 patches each look alike in all views."""
    scene = 7 * helpers.one_hot(np.arange(64) // 16, 8)
    x = np.pad(np.tile(scene, (8, 1, 1)), ((0, 0), (1, 0), (0, 0)))
    draw = helpers.normal(3, 1, 8, 65, 1, 8)
    q, k = x[None, None, :, :, None] + np.float32(0.1) * draw[:2]
    return q, k, draw[2]


def test_a_quarter_of_the_blocks_finds_the_matches_between_views(monkeypatch):
    q, k, v = matches()
    patches = [flat(x[:, :, 1:]) for x in (q, k)]
    kept = helpers.program(vggt.select, tau=0.9, sparsity=1.0, **BLOCKS)(*patches)
    assert 0.2 < kept.mean() <= 0.25
    at_random = np.random.default_rng(0).permuted(kept, axis=-1)

    def outputs(q, k, v):
        run = functools.partial(vggt.block_sparse_vggt, specials=1, tau=0.9, **BLOCKS)
        found = run(q, k, v)
        monkeypatch.setattr(vggt, "select", lambda *_: jnp.asarray(at_random))
        return found, run(q, k, v), full(q, k, v)

    found, guessed, exact = helpers.program(outputs)(q, k, v)
    norm = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    cosine = lambda o: np.mean((norm(o) * norm(exact)).sum(-1))
    assert cosine(found) > 0.99 and cosine(guessed) < 0.9


def test_what_is_not_kept_is_not_read():
    q, k, v = (np.ones((1, 1100, 1, 8), np.float32) for _ in range(3))
    k[:, 64:], v[:, 64:] = np.nan, np.nan
    kept = jnp.asarray(np.arange(18) == 0)[None].repeat(9, 0)[None, None]
    attend = lambda *x: vggt._attend(*x, masks.Blocks(kept, 128, 64)).sum()
    value, grad = helpers.program(jax.value_and_grad(attend))(q, k, v, k[:, :5], v[:, :5])
    assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize("options", [dict(tau=1.1), dict(sparsity=-0.1), dict(specials=19)])
def test_refuses_what_it_cannot_do(options):
    with pytest.raises(ValueError, match="must"):
        vggt.block_sparse_vggt(*map(jnp.asarray, example()), **options)
