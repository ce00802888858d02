import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import moa_sparse_spans as moa

KEY = jax.random.key(0)
SMALL = dict(sinks=2, block=4)


def example(T, N=4, K=2):
    q, k, v = jax.random.normal(KEY, (3, 2, T, N, 8))
    return q, k[:, :, :K], v[:, :, :K]


@pytest.mark.parametrize("T", [16, 48])
def test_a_span_follows_the_length(T):
    spans = ((6, 0.0), (0, 0.5))
    sizes = dict(zip(spans, ((8, 8) if T == 16 else (8, 24)), strict=True))
    assert {span: moa.tokens(span, T, 4) for span in spans} == sizes
    lag = np.arange(T)[:, None] - np.arange(T)[None]
    near = lag[None] < np.repeat([sizes[s] for s in spans], 2)[:, None, None]
    seen = (lag >= 0) & (near | (np.arange(T) < 2))
    run = functools.partial(moa.moa_sparse_spans, spans=spans, **SMALL)
    actual = jax.jit(run)(*example(T))
    expected = ops.dot_product_attention(*example(T), mask=masks.Dense(jnp.asarray(seen)[None]))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_influence_is_the_exact_difference_of_a_linear_loss():
    a = jax.nn.softmax(jax.random.normal(KEY, (3, 6)))
    g = jax.random.normal(jax.random.key(1), (3, 6))
    without = a[:, None] * (1 - jnp.eye(6))[None]  # row, hidden entry, entry
    without = without / without.sum(-1, keepdims=True)
    gained = (without * g[:, None]).sum(-1) - (a * g).sum(-1, keepdims=True)
    chex.assert_trees_all_close(moa.influence(a, g), gained, rtol=1e-4, atol=1e-6)
    alone = moa.influence(jnp.array([[1.0, 0.0]]), jnp.array([[2.0, 3.0]]))
    chex.assert_trees_all_close(alone, jnp.array([[-2.0, 0.0]]))


def test_hidden_influence_is_that_of_the_entries_out_of_sight():
    e = jax.random.normal(KEY, (2, 3, 12, 12))
    options = ((4, 0.0), (0, 0.5), (0, 1.0))
    found = moa.hidden(e, options, **SMALL)
    for p, size in enumerate((4, 8, 12)):
        unseen = [(t, s) for t in range(12) for s in range(2, t - size + 1)]
        expected = sum(e[:, :, t, s] for t, s in unseen) + 0 * e[:, :, 0, 0]
        chex.assert_trees_all_close(found[:, p], expected.mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_is_the_best_of_all(seed):
    draw = np.random.default_rng(seed)
    losses, density = draw.normal(size=(2, 4, 3)), draw.uniform(0.1, 1, size=(2, 3))
    budget = density.min(-1) + 0.4 * np.ptp(density, -1)
    importance = np.array([1.0, 0.3])
    total = lambda choice: (importance @ losses[:, np.arange(4), choice]).sum()
    keeps = lambda choice: (density[:, choice].mean(-1) <= budget).all()
    choices = [np.array(c) for c in itertools.product(range(3), repeat=4)]
    best = min(filter(keeps, choices), key=total)
    found = moa.plan(losses, density, budget, importance=importance)
    assert keeps(found) and total(found) == pytest.approx(total(best))
    free = moa.plan(losses, density, np.ones(2), importance=importance)
    np.testing.assert_array_equal(free, np.tensordot(importance, losses, 1).argmin(-1))


def test_planned_spans_do_better_than_one_for_all_with_the_same_mean():
    T, lags = 32, np.array([1, 20])  # one head looks at the token before, one far back
    v = jax.random.normal(KEY, (1, T, 2, 8))
    t = np.arange(T)
    code = 30 * jax.nn.one_hot(t, T)[None, :, None].repeat(2, 2)
    q = jnp.stack([code[:, np.maximum(t - lag, 0), 0] for lag in lags], 2)
    full = ops.dot_product_attention(q, code, v, mask=masks.Causal())
    x = jnp.where(t[:, None] >= t, jnp.einsum("BTNH,BSNH->BNTS", q, code) / np.sqrt(T), -jnp.inf)
    a = jax.nn.softmax(0.06 * x)  # so soft that no weight is 1
    loss = lambda a: -(jnp.einsum("BNTS,BSNV->BTNV", a, v) * full).sum()
    options = ((4, 0.0), (16, 0.0), (28, 0.0))
    losses = moa.hidden(moa.influence(a, jax.grad(loss)(a)), options, **SMALL)
    density = np.array([[4, 16, 28]]) / T
    choice = moa.plan(np.asarray(losses)[None], density, np.array([0.5]))
    assert choice.tolist() == [0, 2]
    run = lambda spans: moa.moa_sparse_spans(q, code, v, spans=spans, **SMALL)
    error = lambda spans: jnp.abs(run(spans) - full).mean()
    assert error(tuple(options[p] for p in choice)) < 0.1 * error((options[1],) * 2)


def test_what_lies_out_of_a_span_is_not_read():
    q, k, v = example(1200)
    t = jnp.arange(1200)[None, :, None, None]
    k, v = (jnp.where((t > 64) & (t < 500), jnp.nan, x) for x in (k, v))
    options = dict(spans=((64, 0.0), (0, 0.02)), sinks=0)
    o = jax.jit(functools.partial(moa.moa_sparse_spans, **options))(q, k, v)
    assert jnp.isfinite(o[:, 1024:]).all() and jnp.isnan(o[:, 500]).any()


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="one for each key head"):
        moa.moa_sparse_spans(*example(6), spans=((0, 1.0),))
    with pytest.raises(ValueError, match="must not be negative"):
        moa.moa_sparse_spans(*example(6), spans=((0, 1.0), (-1, 0.5)))
    with pytest.raises(ValueError, match="must allow the smallest"):
        moa.plan(np.ones((1, 2, 2)), np.array([[0.5, 1.0]]), np.array([0.4]))
