"""Only what is particular to SeerAttention; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import parallel
from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import seerattention as lib
from tests import cost
from tests.parallel import helpers as devices
from tests.sparse import helpers


def example(T, block=4, query_block=1):
    I, L = -(-T // query_block), -(-T // block)
    gates = helpers.normal(2, I, 4, 8, seed=1), helpers.normal(2, L, 2, 8, seed=2)
    return *helpers.example(T), *gates


def test_all_blocks_are_full_attention():
    args = example(23)
    actual = helpers.program(lib.seerattention, block=4, topk=6)(*args)
    chex.assert_trees_all_close(actual, helpers.causal(*args[:3]), rtol=1e-5, atol=1e-5)


def test_agrees_with_the_oracle_in_small_blocks():
    options = dict(block=4, topk=3)
    fn, oracle = (functools.partial(f, **options) for f in (lib.seerattention, lib.SPEC.oracle))
    helpers.assert_same(fn, oracle, example(23))


def test_a_block_of_queries_shares_its_choice():
    def both(*args):
        *qkv, gate_q, gate_k = args
        run = functools.partial(lib.seerattention, *qkv, block=4, topk=3)
        return run(gate_q, gate_k, query_block=2), run(jnp.repeat(gate_q, 2, 1), gate_k)

    chex.assert_trees_all_equal(*helpers.program(both)(*example(22, query_block=2)))


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
    args = [x.astype(np.float32) for x in (q, k, gate_q, gate_k)]
    options = dict(block=4, query_block=query_block)
    run = jax.jit(
        lambda *args: lib.distillation_loss(*args, mask=masks.Valid(jnp.asarray(valid)), **options)
    )
    loss = run(*args)
    chex.assert_trees_all_close(loss, np.float32(total / (8 * len(gate_q[0]))), rtol=1e-5)


def topics():
    """A query looks for one key, which the mean of its block hides and the greatest shows."""
    T, C, L = 64, 8, 8
    draw = np.random.default_rng(0)
    k = np.tile(helpers.one_hot(draw.integers(0, 8, (2, L)), 8)[:, :, None], (1, 1, C, 1))
    k = np.where(np.arange(C)[None, None, :, None] == 3, 7.0, -1.0) * k
    q = 2 * helpers.one_hot(draw.integers(0, 8, (2, T)), 8)
    return q[:, :, None], k.reshape(2, T, 1, 8).astype(np.float32)


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
    w = [helpers.normal(1, F, 8) * np.float32(F**-0.5) for F in (8, 24)]

    @jax.jit
    def run(q, k, w):
        pooled = lib.pools(k, jnp.ones(k.shape[:2], bool), 8)
        gates = lambda w: (lib.gate(q, w[0], 1, None), lib.gate(pooled, w[1], 8, None))

        def step(w, _):
            loss = lambda w: lib.distillation_loss(q, k, *gates(w), block=8)
            return jax.tree.map(lambda x, g: x - 0.3 * g, w, jax.grad(loss)(w)), None

        w, _ = jax.lax.scan(step, w, None, 300)
        mean = jnp.einsum("BLNF,FH->BLNH", pooled, jnp.eye(24)[:, 16:])
        return *captured(*gates(w), q, k), captured(q, mean, q, k)[0]

    learned, best, by_mean = jax.device_get(run(q, k, w))
    assert learned > 0.95 * best and by_mean < 0.8 * learned


def test_the_gate_learns_from_its_own_loss_alone():
    module = lib.SeerAttention(num_heads=2, head_dim=8, gate_dim=4, block=2, topk=2)
    x, tables = helpers.normal(2, 9, 16), ("gate_query", "gate_key")
    helpers.assert_learns_from_its_own_loss_alone(module, x, "distill", tables)


def test_each_device_adds_its_share_of_the_loss():
    """Of examples and heads; `parallel.matrix` has those of queries and of heads."""
    axes = dict(data=2, context=1, tensor=2)
    options = dict(block=4, topk=2, distill=0.5)
    devices.assert_same("gather", lib.SPEC, example(11), axes, **options)


def test_streams_into_a_longer_cache():
    options = dict(num_heads=4, num_kv_heads=2, head_dim=8, gate_dim=4, block=3, topk=2)
    module = lib.SeerAttention(**options, rotary_base=100.0)
    helpers.assert_streams(module, helpers.normal(2, 19, 16), (7,), 28)


def test_gates_turn_by_the_first_token_of_their_block():
    """So that only the distance of two blocks counts."""

    def gates(x, w):
        turn = functools.partial(lib.gate, weight=w, base=100.0)
        return turn(x, size=1), turn(x[:, :3], size=2), turn(x[:, :2], size=1, start=4)

    a, c, later = helpers.program(gates)(np.ones((1, 6, 1, 4), np.float32), helpers.normal(1, 4, 8))
    chex.assert_trees_all_close(a[:, ::2], c, rtol=1e-6)
    chex.assert_trees_all_close(later, a[:, 4:], rtol=1e-5, atol=1e-6)


def test_a_step_reads_only_the_blocks_that_it_chooses():
    _, k, v, *_ = example(20)
    one = np.ones((2, 1, 4, 8), np.float32)
    gate_k = np.zeros((2, 5, 2, 8), np.float32)
    gate_k[:, 1] = 1.0
    unread = np.isin(np.arange(20) // 4, [1, 4], invert=True)[None, :, None, None]
    fn = helpers.program(lib.seerattention, block=4, topk=2, q_offset=19)
    run = lambda k, v: fn(one, k, v, one, gate_k)
    hidden = (np.where(unread, np.float32(np.nan), x) for x in (k, v))
    chex.assert_trees_all_equal(run(*hidden), run(k, v))


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


@pytest.mark.parametrize("strategy", ["gather", "all_to_all", "block_ring"])
def test_refuses_gates_of_other_blocks_over_devices(strategy):
    """That fill up to the same lengths as the right ones."""
    q, k, v, gate_q, gate_k = example(11)
    fn = functools.partial(parallel.shard(strategy, lib.SPEC, devices.mesh(context=4)), block=4)
    for gates in ((gate_q[:, :10], gate_k), (gate_q, gate_k[:, :2])):
        with pytest.raises(ValueError, match=r"must be (of|as many)"):
            jax.eval_shape(fn, q, k, v, *gates)


def test_refuses_what_it_cannot_do():
    args = [jnp.asarray(x) for x in example(6)]
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
