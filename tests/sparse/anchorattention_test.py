"""Only what is particular to AnchorAttention; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks
from attnjax.ops import block_selection as blocks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import anchorattention as lib

KEY = jax.random.key(0)
T, C, STEP = 64, 4, 2
SIZES = dict(block=C, step=STEP)


def example(T=T):
    return lib.SPEC.example(KEY, T).values()


def striped(stripes=(13, 22, 30, 41)):
    """Every query scores a few single keys and the first one high, all others near 0."""
    q = (0.3 * jax.random.normal(KEY, (1, T, 1, 16))).at[..., 0].set(40.0)
    loud = jnp.isin(jnp.arange(T), jnp.array([0, *stripes]))
    k = 0.3 * jax.random.normal(jax.random.key(1), (1, T, 1, 16))
    return q, k.at[..., 0].set(jnp.where(loud, 1.0, 0.0)[None, :, None])


def run(*args, **options):
    return jax.jit(functools.partial(lib.anchorattention, **(SIZES | options)))(*args)


def select(q, k, **options):
    return jax.jit(functools.partial(lib.select, **(SIZES | options)))(q, k)


def by_query(read, size=C * STEP):
    """(B N g T) -> (B N T T), what each query sees."""
    rows = jnp.repeat(read, size, 2)[:, :, : read.shape[-1]]  # the last group is filled up
    return rows & masks.dense(masks.Causal(), *rows.shape[2:])


def recall(q, k, seen):
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) * q.shape[-1] ** -0.5
    w = jax.nn.softmax(jnp.where(masks.dense(masks.Causal(), T, T), x, -jnp.inf))
    return float(jnp.where(seen, w, 0).sum(-1).mean())


def near(T=T):
    """The first block and one's own group."""
    group = masks.Segments(jnp.arange(T)[None].repeat(2, 0) // (C * STEP))
    return masks.Causal() & (masks.Prefix(C) | group)


@pytest.mark.parametrize("theta, mask", [(jnp.inf, masks.Causal()), (-jnp.inf, near(61))])
def test_its_ends(theta, mask):
    args = example(61)
    full = ops.dot_product_attention(*args, mask=mask)
    chex.assert_trees_all_close(run(*args, theta=theta), full, rtol=1e-5, atol=1e-6)


def test_is_attention_to_the_keys_that_it_selects():
    q, k, v = example(61)
    seen = by_query(select(q, k, theta=0.5))
    full = ops.dot_product_attention(q, k, v, mask=masks.Dense(seen))
    chex.assert_trees_all_close(run(q, k, v, theta=0.5), full, rtol=1e-5, atol=1e-6)
    assert 0.3 < seen.sum() / (2 * 4 * 61 * 31) < 0.9


def test_finds_single_columns():
    q, k = striped()
    read = select(q, k, theta=3.0)[0, 0]
    s, start = jnp.arange(T)[None], (C * STEP * jnp.arange(T // (C * STEP)))[:, None]
    loud = jnp.isin(s, jnp.array([13, 22, 30, 41]))
    assert (read == (s < C) | (s >= start) | loud).all()


def test_recalls_more_than_blocks_and_than_a_random_choice_of_as_many_keys():
    q, k = striped()
    read = select(q, k, theta=3.0)
    s, group = jnp.arange(T), jnp.arange(T // (C * STEP))
    always = (s[None] < C) | (s[None] >= C * STEP * group[:, None])
    count = (read & ~always[None, None]).sum(-1, keepdims=True)
    pooled = jnp.einsum("BQNH,BLNH->BNQL", blocks.means(q, C * STEP), blocks.means(k, C))
    pooled = jnp.where(always[None, None, :, ::C], -jnp.inf, pooled)
    rank = jnp.argsort(jnp.argsort(-pooled))
    in_blocks = jnp.repeat(rank < (count + C - 1) // C, C, -1)
    noise = jnp.where(always, -1.0, jax.random.uniform(KEY, always.shape))[None, None]
    at_random = jnp.argsort(jnp.argsort(-noise)) < count
    found = recall(q, k, by_query(read))
    assert found > recall(q, k, by_query(always[None, None] | in_blocks)) + 0.05
    assert found > recall(q, k, by_query(always[None, None] | at_random)) + 0.2 and found > 0.95


def test_a_larger_theta_reads_more():
    q, k, _ = example()
    few, some, many = (select(q, k, theta=theta) for theta in (-0.3, 0.2, 0.7))
    assert (few <= some).all() and (some <= many).all()
    assert few.sum() < some.sum() < many.sum()
    found = [recall(q, jnp.repeat(k, 2, 2), by_query(read)) for read in (few, some, many)]
    assert found == sorted(found) and found[2] > found[0] + 0.1


def test_one_block_that_comes_near_is_enough():
    q, k = striped(stripes=(13,))
    k = k.at[:, :, :, 1].set(0.0).at[:, 0, :, 1].set(1.0)
    elsewhere = jnp.zeros_like(q).at[..., 1].set(40.0)  # at the first key alone
    second = (jnp.arange(T) // C % STEP == 1)[None, :, None, None]  # block of each group
    assert select(jnp.where(second, elsewhere, q), k, theta=3.0)[0, 0, 2:, 13].all()
    assert not select(elsewhere, k, theta=3.0)[0, 0, 2:, 13].any()


def test_keys_that_are_not_read_are_not_computed():
    """A whole tile of unread values is not touched by the last group."""
    q, k, v = (x[:1, :, :1] for x in lib.SPEC.example(KEY, 1024).values())
    spoiled = v.at[:, 500:800].set(jnp.nan)
    o = run(q, k, spoiled, theta=-jnp.inf, block=32, step=4)
    assert jnp.isfinite(o[:, 896:]).all() and jnp.isnan(o[:, 500:800]).any()


def test_going_on_is_full_attention():
    options = dict(num_heads=2, head_dim=8, block=2, step=2, theta=-jnp.inf)
    module = lib.AnchorAttention(**options)
    dense = module.clone(fn=lambda *x, mask, **_: ops.dot_product_attention(*x, mask=mask))
    x = jax.random.normal(KEY, (2, 20, 16))

    @jax.jit
    def both(x):
        params = module.init(KEY, x)
        state = module.apply(params, 2, 24, method="init_state")
        state, a = module.apply(params, state, x[:, :15], method="extend")
        state, b = module.apply(params, state, x[:, 15:], method="extend")
        return jnp.concatenate([a, b], 1), dense.apply(params, x, mask=masks.Causal())

    chex.assert_trees_all_close(*both(x), rtol=1e-5, atol=1e-5)


def test_refuses_what_it_cannot_do():
    q, k, v = example(6)
    with pytest.raises(NotImplementedError, match="anchorattention can't honour Window"):
        lib.anchorattention(q, k, v, mask=masks.Window(2))
    for options in (dict(block=0), dict(step=0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            lib.anchorattention(q, k, v, **options)
    with pytest.raises(ValueError, match="must be of the tokens of"):
        lib.anchorattention(q[:, :3], k, v)
