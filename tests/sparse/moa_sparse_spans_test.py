import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import moa_sparse_spans as moa
from tests.sparse import helpers

SMALL = dict(sinks=2, block=4)


@pytest.mark.parametrize("T", [16, 48])
def test_a_span_follows_the_length(T):
    spans = ((6, 0.0), (0, 0.5))
    sizes = dict(zip(spans, ((8, 8) if T == 16 else (8, 24)), strict=True))
    assert {span: moa.tokens(span, T, 4) for span in spans} == sizes
    lag = np.arange(T)[:, None] - np.arange(T)[None]
    near = lag[None] < np.repeat([sizes[s] for s in spans], 2)[:, None, None]
    seen = (lag >= 0) & (near | (np.arange(T) < 2))

    def both(*args):
        expected = ops.dot_product_attention(*args, mask=masks.Dense(jnp.asarray(seen)[None]))
        return moa.moa_sparse_spans(*args, spans=spans, **SMALL), expected

    chex.assert_trees_all_close(*helpers.program(both)(*helpers.example(T)), rtol=1e-5, atol=1e-5)


def test_influence_is_the_exact_difference_of_a_linear_loss():
    a, g = helpers.normal(2, 4, 6)
    a = np.exp(a) / np.exp(a).sum(-1, keepdims=True)
    a[3], g[3] = np.arange(6) == 0, np.arange(2, 8)  # an entry alone
    without = a[:3, None] * (1 - np.eye(6, dtype=np.float32))[None]  # row, hidden entry, entry
    without = without / without.sum(-1, keepdims=True)
    gained = (without * g[:3, None]).sum(-1) - (a * g)[:3].sum(-1, keepdims=True)
    found = helpers.program(moa.influence)(a, g)
    chex.assert_trees_all_close(found[:3], gained, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(found[3], np.float32([-2, 0, 0, 0, 0, 0]))


def test_hidden_influence_is_that_of_the_entries_out_of_sight():
    e = helpers.normal(2, 3, 12, 12)
    options = ((4, 0.0), (0, 0.5), (0, 1.0))
    found = helpers.program(moa.hidden, options=options, **SMALL)(e)
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
    t, v = np.arange(T), helpers.normal(1, T, 2, 8)
    code = 30 * helpers.one_hot(t, T)[None, :, None].repeat(2, 2)
    q = np.stack([code[:, np.maximum(t - lag, 0), 0] for lag in lags], 2)
    options = ((4, 0.0), (16, 0.0), (28, 0.0))

    def hidden(q, k, v):
        full = ops.dot_product_attention(q, k, v, mask=masks.Causal())
        x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(T)
        # so soft that no weight is 1
        a = jax.nn.softmax(jnp.where(np.tri(T, dtype=bool), 0.06 * x, -jnp.inf))
        loss = lambda a: -(jnp.einsum("BNTS,BSNV->BTNV", a, v) * full).sum()
        return moa.hidden(moa.influence(a, jax.grad(loss)(a)), options, **SMALL), full

    losses, full = helpers.program(hidden)(q, code, v)
    density = np.array([[4, 16, 28]]) / T
    choice = moa.plan(losses[None], density, np.array([0.5]))
    assert choice.tolist() == [0, 2]
    run = lambda spans: helpers.program(moa.moa_sparse_spans, spans=spans, **SMALL)(q, code, v)
    error = lambda spans: np.abs(run(spans) - full).mean()
    assert error(tuple(options[p] for p in choice)) < 0.1 * error((options[1],) * 2)


def test_what_lies_out_of_a_span_is_not_read():
    q, k, v = helpers.example(1200)
    k[:, 65:500], v[:, 65:500] = np.nan, np.nan
    spans = (64, 0.0), (0, 0.02)
    o = helpers.program(moa.moa_sparse_spans, spans=spans, sinks=0)(q, k, v)
    assert np.isfinite(o[:, 1024:]).all() and np.isnan(o[:, 500]).any()


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="one for each key head"):
        moa.moa_sparse_spans(*map(jnp.asarray, helpers.example(6)), spans=((0, 1.0),))
    with pytest.raises(ValueError, match="must not be negative"):
        moa.moa_sparse_spans(*map(jnp.asarray, helpers.example(6)), spans=((0, 1.0), (-1, 0.5)))
    with pytest.raises(ValueError, match="must allow the smallest"):
        moa.plan(np.ones((1, 2, 2)), np.array([[0.5, 1.0]]), np.array([0.4]))
