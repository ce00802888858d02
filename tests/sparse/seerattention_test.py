"""Only what is particular to SeerAttention; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import seerattention as lib
from tests import cost

KEY = jax.random.key(0)


def example(T, block=4, query_block=1):
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(KEY, i), (2, *shape, 8))
    I, L = -(-T // query_block), -(-T // block)
    return draw(0, T, 4), draw(1, T, 2), draw(2, T, 2), draw(3, I, 4), draw(4, L, 2)


def assert_same(fn, other, args):
    def both(fn):
        out, pull = jax.vjp(fn, *args)
        return out, pull(jnp.cos(out))

    actual, expected = jax.jit(lambda: (both(fn), both(other)))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_all_blocks_are_full_attention():
    full = lambda q, k, v, *gates: ops.dot_product_attention(q, k, v, mask=masks.Causal())
    assert_same(functools.partial(lib.seerattention, block=4, topk=6), full, example(23))


@pytest.mark.parametrize("topk", [1, 3])
def test_agrees_with_the_oracle_in_small_blocks(topk):
    options = dict(block=4, topk=topk)
    fn, oracle = (functools.partial(f, **options) for f in (lib.seerattention, lib.SPEC.oracle))
    assert_same(fn, oracle, example(23))


def test_a_block_of_queries_shares_its_choice():
    *qkv, gate_q, gate_k = example(22, query_block=2)
    options = dict(block=4, topk=3)
    shared = functools.partial(lib.seerattention, query_block=2, **options)(*qkv, gate_q, gate_k)
    alone = lib.seerattention(*qkv, jnp.repeat(gate_q, 2, 1), gate_k, **options)
    chex.assert_trees_all_equal(shared, alone)


@pytest.mark.parametrize("query_block", [1, 4])
def test_the_gate_is_taught_the_pooled_map_of_full_attention(query_block):
    q, k, _, gate_q, gate_k = (np.asarray(x, np.float64) for x in example(11, 4, query_block))
    valid = np.ones((2, 11), bool)
    valid[1, 2] = False
    total = 0.0
    for b, n, i in np.ndindex(2, 4, len(gate_q[0])):
        rows = range(i * query_block, min((i + 1) * query_block, 11))
        w = np.zeros((len(rows), 12))
        for r, t in enumerate(rows):
            seen = [s for s in range(t + 1) if valid[b, s]]
            e = np.exp(k[b, seen, n // 2] @ q[b, t, n] / 8**0.5)
            w[r, seen] = e / e.sum()
        m = w.reshape(len(rows), 3, 4).max((0, 2))
        near = range(rows[-1] // 4 + 1)
        g = np.exp(gate_k[b, near, n // 2] @ gate_q[b, i, n] / 8**0.5)
        total -= (m[near] / m.sum() * np.log(g / g.sum())).sum()
    args = [jnp.asarray(x, jnp.float32) for x in (q, k, gate_q, gate_k)]
    options = dict(mask=masks.Valid(jnp.asarray(valid)), block=4, query_block=query_block)
    loss = jax.jit(lambda: lib.distillation_loss(*args, **options))()
    chex.assert_trees_all_close(loss, np.float32(total / (8 * len(gate_q[0]))), rtol=1e-5)


def topics():
    """A query looks for one key, which the mean of its block hides and the greatest shows."""
    T, C, L = 64, 8, 8
    topic = jax.random.randint(KEY, (2, L), 0, 8)
    k = jnp.tile(jax.nn.one_hot(topic, 8)[:, :, None], (1, 1, C, 1))
    k = jnp.where(jnp.arange(C)[None, None, :, None] == 3, 7.0, -1.0) * k
    q = 2 * jax.nn.one_hot(jax.random.randint(jax.random.key(1), (2, T), 0, 8), 8)
    return q[:, :, None], k.reshape(2, T, 1, 8)


def captured(gate_q, gate_k, q, k):
    """Mass of full attention in a quarter of the blocks, over queries that have more."""
    w = jax.nn.softmax(
        jnp.where(
            masks.dense(masks.Causal(), 64, 64),
            jnp.einsum("BTNH,BSNH->BNTS", q, k) / 8**0.5,
            -1e30,
        )
    )
    v = jnp.broadcast_to(jnp.eye(8)[:, None].repeat(8, 0)[None], (2, 64, 1, 8))
    seen = lib.best_blocks.best_blocks(
        gate_q, gate_k, jnp.ones((2, 8), bool), jnp.arange(64) // 8, count=2, own=True
    )
    mass = jnp.einsum("BNTS,BSNL->BTL", w, v)
    kept = jnp.take_along_axis(mass, seen[:, :, 0], -1).sum(-1)
    own = jax.nn.one_hot(jnp.arange(64) // 8, 8)[None] * 9
    best = jnp.take_along_axis(mass, jax.lax.top_k(mass + own, 2)[1], -1).sum(-1)
    return kept[:, 24:].mean(), best[:, 24:].mean()


def test_a_gate_finds_what_the_mean_of_a_block_hides():
    q, k = topics()
    pooled = lib.pools(k, jnp.ones(k.shape[:2], bool), 8)
    gates = lambda w: (lib.gate(q, w[0], 1, None), lib.gate(pooled, w[1], 8, None))

    def step(w, _):
        loss = lambda w: lib.distillation_loss(q, k, *gates(w), block=8)
        return jax.tree.map(lambda x, g: x - 0.3 * g, w, jax.grad(loss)(w)), None

    @jax.jit
    def run():
        keys = jax.random.split(KEY)
        w = [
            jax.random.normal(key, (1, F, 8)) * F**-0.5
            for key, F in zip(keys, (8, 24), strict=True)
        ]
        w, _ = jax.lax.scan(step, w, None, 300)
        mean = jnp.einsum("BLNF,FH->BLNH", pooled, jnp.eye(24)[:, 16:])
        return *captured(*gates(w), q, k), captured(q, mean, q, k)[0]

    learned, best, by_mean = run()
    assert learned > 0.95 * best and by_mean < 0.8 * learned


def test_the_gate_learns_from_its_own_loss_alone():
    x = jax.random.normal(KEY, (2, 9, 16))
    options = dict(num_heads=2, head_dim=8, gate_dim=4, block=2, topk=2)
    modules = [lib.SeerAttention(**options, distill=w) for w in (0.0, 1.0, 2.0)]

    @jax.jit
    def grads():
        params = modules[0].init(KEY, x)
        return [jax.grad(lambda p, m=m: (m.apply(p, x) ** 2).sum())(params) for m in modules]

    none, once, twice = (g["params"] for g in grads())
    for name in ("gate_query", "gate_key"):
        a, b, c = (g.pop(name)["table"] for g in (none, once, twice))
        assert not a.any() and b.any()
        chex.assert_trees_all_close(c, 2 * b, rtol=1e-6)
    chex.assert_trees_all_equal(none, once)


def test_streams_into_a_longer_cache():
    options = dict(num_heads=4, num_kv_heads=2, head_dim=8, gate_dim=4, block=3, topk=2)
    module = lib.SeerAttention(**options, rotary_base=100.0)
    x = jax.random.normal(KEY, (2, 17, 16))

    @jax.jit
    def both(x):
        y, params = module.init_with_output(KEY, x)
        state, ys = module.apply(params, 2, 28, method="init_state"), []
        for piece in jnp.split(x, (7, 8), 1):
            state, part = module.apply(params, state, piece, method="extend")
            ys.append(part)
        return y, jnp.concatenate(ys, 1)

    chex.assert_trees_all_close(*both(x), rtol=1e-5, atol=1e-5)


def test_gates_turn_by_the_first_token_of_their_block():
    """So that only the distance of two blocks counts."""
    x, w = jnp.ones((1, 6, 1, 4)), jax.random.normal(KEY, (1, 4, 8))
    a, c = lib.gate(x, w, 1, 100.0), lib.gate(x[:, :3], w, 2, 100.0)
    chex.assert_trees_all_close(a[:, ::2], c, rtol=1e-6)
    chex.assert_trees_all_close(lib.gate(x[:, :2], w, 1, 100.0, 4), a[:, 4:], rtol=1e-5, atol=1e-6)


def test_a_step_reads_only_the_blocks_that_it_chooses():
    _, k, v, _, _ = example(20)
    q, gate_q = jnp.ones((2, 1, 4, 8)), jnp.ones((2, 1, 4, 8))
    gate_k = jnp.zeros((2, 5, 2, 8)).at[:, 1].set(1.0)
    unread = jnp.isin(jnp.arange(20) // 4, jnp.array([1, 4]), invert=True)[None, :, None, None]
    fn = functools.partial(lib.seerattention, block=4, topk=2, q_offset=19)
    run = jax.jit(lambda k, v: fn(q, k, v, gate_q, gate_k))
    chex.assert_trees_all_equal(run(*(jnp.where(unread, jnp.nan, x) for x in (k, v))), run(k, v))


def test_costs_less_than_full_attention():
    def count(fn, T, topk=None):
        shape = lambda *s: jax.ShapeDtypeStruct((1, *s), jnp.float32)
        qkv, gates = [shape(T, 1, 64)] * 3, [shape(T, 1, 8), shape(T // 64, 1, 8)]
        args = qkv if fn is full else qkv + gates
        return cost.operations(jax.grad(lambda *x: fn(*x).sum(), (0, 1, 2)), *args)

    full = functools.partial(ops.dot_product_attention, implementation="dense")
    few = functools.partial(lib.seerattention, topk=3)
    assert count(few, 4096) < count(full, 4096) / 6
    assert count(few, 4096) < 2.2 * count(few, 2048)


def test_refuses_what_it_cannot_do():
    args = example(6)
    with pytest.raises(NotImplementedError, match="seerattention can't honour Window"):
        lib.seerattention(*args, block=4, mask=masks.Window(2))
    for options in (dict(block=0), dict(topk=0), dict(block=4, query_block=3)):
        with pytest.raises(ValueError, match="query_block"):
            lib.seerattention(*args, **options)
    with pytest.raises(ValueError, match="must be of \\(6, 3\\) blocks"):
        lib.seerattention(*args, block=2)
    with pytest.raises(NotImplementedError, match="query_block=2 can't be streamed"):
        module = lib.SeerAttention(num_heads=2, head_dim=8, query_block=2)
        module.apply({}, 1, 64, method="init_state")
