"""Only what is particular to LongHeads; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks, positions
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import unit_vectors
from attnjax.softmax import multi_head_attention as mha
from attnjax.sparse import longheads as lib
from tests import cost

KEY = jax.random.key(0)
SIZES = dict(window=16, chunk=4)


def example(T):
    return lib.SPEC.example(KEY, T).values()


def run(*args, **options):
    return jax.jit(functools.partial(lib.longheads, **(SIZES | options)))(*args)


def rotary_attention(q, k, v):
    q, k = (positions.rotary(x, jnp.arange(x.shape[1])) for x in (q, k))
    return ops.dot_product_attention(q, k, v, mask=masks.Causal())


def test_up_to_the_window_it_is_rotary_attention():
    args = example(40)
    expected = jax.jit(rotary_attention)(*args)[:, :16]
    chex.assert_trees_all_close(run(*args)[:, :16], expected, rtol=1e-4, atol=1e-5)


def test_a_query_reads_its_chunks_as_if_nothing_lay_between():
    """The last query of a long text is that of a short one of the chunks that it chose."""
    q, k, v = (x[:1, :, :1] for x in example(40))
    summaries = lib.summarise(q, k, v, chunk=4)
    chosen = lib.choose(q[:, 39], summaries, jnp.array(9), 4)[0, 0]
    assert chosen[0] == 0 and (chosen[2:] == jnp.array([8, 9])).all() and 0 < chosen[1] < 8
    at = (4 * chosen[:, None] + jnp.arange(4)[None]).reshape(-1)  # positions become 0 to 15
    short = jax.jit(rotary_attention)(q[:, at], k[:, at], v[:, at])[:, -1]
    chex.assert_trees_all_close(run(q, k, v)[:, -1], short, rtol=1e-5, atol=1e-5)


def test_a_needle_is_found_as_well_from_afar():
    """A rotation for short texts has turned it away, 505 tokens on."""
    needle = jnp.zeros(16).at[5:7].set(1.0)  # pairs that turn by 0.06 and 0.03 a token

    def weight(T, attend):
        k = (0.3 * jax.random.normal(KEY, (1, T, 1, 16))).at[:, 4:8].set(3 * needle)
        q = jax.random.normal(jax.random.key(1), (1, T, 1, 16)).at[:, -1].set(6 * needle)
        v = jnp.zeros((1, T, 1, 16)).at[:, 4:8].set(1.0)
        return float(jax.jit(attend)(q, k, v)[0, -1, 0, 0])

    ours = functools.partial(lib.longheads, **SIZES, base=100.0)
    full = functools.partial(lib.longheads, window=512, chunk=4, base=100.0)
    near, far = (weight(T, ours) for T in (28, 512))
    assert near > 0.9 and abs(near - far) < 0.05 and weight(512, full) < 0.1


def test_heads_read_different_chunks():
    summaries = unit_vectors.unit(jax.random.normal(KEY, (1, 12, 4, 8)))
    q = 9 * jnp.stack([summaries[:, 2 + n, n] for n in range(4)], 1)
    chosen = lib.choose(q, summaries, jnp.array(11), 4)[0]
    for n in range(4):
        assert {0, 2 + n, 10, 11} == set(chosen[n].tolist())


def test_recalls_more_of_the_attention_than_other_chunks_with_more_window():
    T, C = 96, 4
    own = jax.nn.one_hot(jnp.arange(T) // C, 32)
    noise = 0.3 * jax.random.normal(KEY, (3, T, 32))
    looks = sum(own[np.arange(T) // C * C // d] for d in (2, 3, 4))  # chunks at 1/2, 1/3 and 1/4
    q, k, v = 40 * looks + noise[0], own + noise[1], own + noise[2]
    x = jnp.where(np.tril(np.ones((T, T), bool)), q @ k.T * 32**-0.5, -jnp.inf)
    mass = jax.nn.softmax(x).reshape(T, -1, C).sum(-1)
    summaries = lib.summarise(*(x[None, :, None] for x in (q, k, v)), chunk=C, base=1e9)

    def recall(count, summaries):
        pick = lambda q, t: lib.choose(q[None, None], summaries, t // C, count)[0, 0]
        chosen = jax.jit(jax.vmap(pick))(q, jnp.arange(T))
        return float(jnp.take_along_axis(mass, chosen, 1).sum(-1)[T // 2 :].mean())

    few, some, many = (recall(count, summaries) for count in (4, 6, 12))
    at_random = recall(6, jax.random.normal(KEY, summaries.shape))
    assert few < some < many and many > 0.9 and some > at_random + 0.2


def test_no_query_reads_a_later_key_and_none_chooses_by_one():
    q, k, v = example(40)
    o = run(q, k, v)
    later = [x.at[:, 31:].set(9.0) for x in (q, k, v)]
    chex.assert_trees_all_close(run(*later)[:, :31], o[:, :31], rtol=1e-6, atol=1e-6)


def test_costs_the_same_for_every_query():
    def count(T):
        q = jax.ShapeDtypeStruct((1, T, 1, 32), jnp.float32)
        return cost.operations(functools.partial(lib.longheads, window=96, chunk=32), q, q, q)

    assert count(2048) < 2.2 * count(1024)


def test_decodes_with_summaries():
    q, k, v = example(40)
    summaries = lib.summarise(q, k, v, chunk=4)
    last = run(q[:, 33:], k, v, summaries=summaries, q_offset=33)
    chex.assert_trees_all_close(last, run(q, k, v)[:, 33:], rtol=1e-5, atol=1e-5)


def test_is_a_function_of_multi_head_attention():
    x = jax.random.normal(KEY, (2, 30, 16))
    module = mha.MultiHeadAttention(num_heads=2, head_dim=8)
    long = module.clone(fn=functools.partial(lib.longheads, **SIZES))
    rotated = module.clone(rotary_base=10_000.0)

    @jax.jit
    def outputs(x):
        params, mask = module.init(KEY, x), masks.Causal()
        return long.apply(params, x, mask=mask), rotated.apply(params, x, mask=mask)

    actual, full = outputs(x)
    chex.assert_trees_all_close(actual[:, :16], full[:, :16], rtol=1e-4, atol=1e-5)
    assert jnp.abs(actual - full)[:, 16:].max() > 1e-2


def test_refuses_what_it_cannot_do():
    q, k, v = example(20)
    with pytest.raises(NotImplementedError, match="longheads can't honour Window"):
        lib.longheads(q, k, v, mask=masks.Window(2))
    for options in (dict(window=14), dict(window=8), dict(chunk=0)):
        with pytest.raises(ValueError, match="must be a multiple of"):
            lib.longheads(q, k, v, **(SIZES | options))
    with pytest.raises(ValueError, match="summaries must be given"):
        lib.longheads(q[:, :1], k, v, q_offset=19, **SIZES)
