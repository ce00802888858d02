"""Only what is particular to LongHeads; the rest is tests/conformance_test.py."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import parallel
from attnjax.core import masks, positions, registry
from attnjax.ops import dot_product_attention as ops
from attnjax.softmax import multi_head_attention as mha
from attnjax.sparse import longheads as lib
from tests import cost
from tests.initial import initial
from tests.parallel import helpers as devices
from tests.sparse import helpers

SIZES = dict(window=16, chunk=4)


def run(*args, **options):
    return helpers.program(lib.longheads, **(SIZES | options))(*args)


def choose(q, summaries, here, count):
    return helpers.program(lib.choose, count=count)(q, summaries, np.int32(here))


@helpers.program
def rotary_attention(q, k, v):
    q, k = (positions.rotary(x, jnp.arange(x.shape[1])) for x in (q, k))
    return ops.dot_product_attention(q, k, v, mask=masks.Causal())


def test_up_to_the_window_it_is_rotary_attention():
    args = helpers.example(40)
    expected = rotary_attention(*args)[:, :16]
    chex.assert_trees_all_close(run(*args)[:, :16], expected, rtol=1e-4, atol=1e-5)


def test_a_query_reads_its_chunks_as_if_nothing_lay_between():
    """The last query of a long text is that of a short one of the chunks that it chose."""
    q, k, v = helpers.example(40)
    summaries = helpers.program(lib.summarise, chunk=4)(q, k, v)
    chosen = choose(q[:, 39], summaries, 9, 4)[0, 0]  # of the first head of the first text
    assert chosen[0] == 0 and (chosen[2:] == [8, 9]).all() and 0 < chosen[1] < 8
    at = (4 * chosen[:, None] + np.arange(4)[None]).reshape(-1)  # positions become 0 to 15
    short = rotary_attention(q[:, at], k[:, at], v[:, at])[0, -1, 0]
    chex.assert_trees_all_close(run(q, k, v)[0, -1, 0], short, rtol=1e-5, atol=1e-5)


def test_a_needle_is_found_as_well_from_afar():
    """A rotation for short texts has turned it away, 505 tokens on."""
    needle = np.isin(np.arange(16), [5, 6])  # pairs that turn by 0.06 and 0.03 a token

    def weight(T, **options):
        q, k = helpers.normal(2, 1, T, 1, 16)
        q[:, -1], k, v = 6 * needle, 0.3 * k, np.zeros_like(k)
        k[:, 4:8], v[:, 4:8] = 3 * needle, 1.0
        return float(run(q, k, v, base=100.0, **options)[0, -1, 0, 0])

    near, far = weight(28), weight(512)
    assert near > 0.9 and abs(near - far) < 0.05 and weight(512, window=512) < 0.1


def test_heads_read_different_chunks():
    summaries = helpers.normal(1, 12, 4, 8)
    summaries /= np.linalg.norm(summaries, axis=-1, keepdims=True)
    q = 9 * np.stack([summaries[:, 2 + n, n] for n in range(4)], 1)
    chosen = choose(q, summaries, 11, 4)[0]
    for n in range(4):
        assert {0, 2 + n, 10, 11} == set(chosen[n].tolist())


def test_recalls_more_of_the_attention_than_other_chunks_with_more_window():
    T, C = 96, 4
    own = helpers.one_hot(np.arange(T) // C, 32)
    noise = 0.3 * helpers.normal(3, T, 32)
    looks = sum(own[np.arange(T) // C * C // d] for d in (2, 3, 4))  # chunks at 1/2, 1/3 and 1/4
    q, k, v = 40 * looks + noise[0], own + noise[1], own + noise[2]
    mass = np.exp(np.where(np.tri(T, dtype=bool), q @ k.T * 32**-0.5, -np.inf))
    mass = (mass / mass.sum(-1, keepdims=True)).reshape(T, -1, C).sum(-1)
    rows = (x[None, :, None] for x in (q, k, v))
    summaries = helpers.program(lib.summarise, chunk=C, base=1e9)(*rows)

    def picked(q, t, summaries, count):
        pick = lambda q, t: lib.choose(q[None, None], summaries, t // C, count)[0, 0]
        return jax.vmap(pick)(q, t)

    def recall(count, summaries):
        chosen = helpers.program(picked, count=count)(q, np.arange(T), summaries)
        return float(np.take_along_axis(mass, chosen, 1).sum(-1)[T // 2 :].mean())

    few, some, many = (recall(count, summaries) for count in (4, 6, 12))
    at_random = recall(6, helpers.normal(*summaries.shape, seed=1))
    assert few < some < many and many > 0.9 and some > at_random + 0.2


def test_no_query_reads_a_later_key_and_none_chooses_by_one():
    args = helpers.example(40)
    later = [np.concatenate([x[:, :31], np.full_like(x[:, 31:], 9.0)], 1) for x in args]
    chex.assert_trees_all_close(run(*later)[:, :31], run(*args)[:, :31], rtol=1e-6, atol=1e-6)


def test_costs_the_same_for_every_query():
    def count(T):
        q = jax.ShapeDtypeStruct((1, T, 1, 32), jnp.float32)
        return cost.operations(functools.partial(lib.longheads, window=96, chunk=32), q, q, q)

    assert count(2048) < 2.2 * count(1024)


def test_decodes_with_summaries():
    q, k, v = helpers.example(40)
    summaries = helpers.program(lib.summarise, chunk=4)(q, k, v)
    attend = lambda *args: lib.longheads(*args[:3], summaries=args[3], q_offset=33, **SIZES)
    last = helpers.program(attend)(q[:, 33:], k, v, summaries)
    chex.assert_trees_all_close(last, run(q, k, v)[:, 33:], rtol=1e-5, atol=1e-5)


def test_is_a_function_of_multi_head_attention():
    x = helpers.normal(2, 30, 16)
    module = mha.MultiHeadAttention(num_heads=2, head_dim=8)
    long = module.clone(fn=functools.partial(lib.longheads, **SIZES))
    rotated = module.clone(rotary_base=10_000.0)

    def outputs(params, x):
        return [m.apply(params, x, mask=masks.Causal()) for m in (long, rotated)]

    actual, full = helpers.program(outputs)(initial(module.init, helpers.KEY, x), x)
    chex.assert_trees_all_close(actual[:, :16], full[:, :16], rtol=1e-4, atol=1e-5)
    assert np.abs(actual - full)[:, 16:].max() > 1e-2


def test_heads_lie_over_devices():
    """At a length that is no multiple of chunks or devices."""
    attention = registry.get("multi_head_attention")
    record = dataclasses.replace(attention, fn=lib.longheads, context=("all_to_all",))
    sizes = dict(window=9, chunk=3)
    devices.assert_same("all_to_all", record, helpers.example(23), dict(context=4), **sizes)


def test_as_no_mechanism_it_is_refused_with_what_would_work():
    message = r"longheads is no mechanism .* fn=longheads, context=\('all_to_all',\)\) does"
    with pytest.raises(ValueError, match=message):
        parallel.shard("all_to_all", lib.SPEC, devices.mesh(context=4))


def test_refuses_what_it_cannot_do():
    q, k, v = (jnp.asarray(x) for x in helpers.example(20))
    with pytest.raises(NotImplementedError, match="longheads can't honour Window"):
        lib.longheads(q, k, v, mask=masks.Window(2))
    for options in (dict(window=14), dict(window=8), dict(chunk=0)):
        with pytest.raises(ValueError, match="must be a multiple of"):
            lib.longheads(q, k, v, **(SIZES | options))
    with pytest.raises(ValueError, match="summaries must be given"):
        lib.longheads(q[:, :1], k, v, q_offset=19, **SIZES)
