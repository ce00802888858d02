"""XLA's form and the kernel, interpreted, against a dense softmax over each sequence's own keys."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnjax.core import sharding
from pallas_kernels import decode_attention as kernels
from pallas_kernels import placing
from pallas_kernels.decode_attention import mosaic_tpu, part, steps, xla

C, L = 4, 6
LENGTHS = np.array([0, 1, 4, 13, 8, 23, 24])  # none, single, page borders, odd, all


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Two pages a step, so that there are several steps at tiny lengths."""
    monkeypatch.setattr(xla, "_KEYS", 2 * C)
    monkeypatch.setattr(mosaic_tpu, "_KEYS", 2 * C)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def inputs(*, lengths=LENGTHS, T=1, N=4, K=2, H=8, V=6, sinks=False):
    """Sequences in pages at random; whatever isn't a token of one is NaN, or no page at all."""
    B = len(lengths)
    table = np.random.default_rng(9).permutation(B * L).reshape(B, L)
    token = (np.arange(C * L)[None] < lengths[:, None]).reshape(B, L, C)

    def pool(seed, size):
        x = np.full((B * L, K, C, size), np.nan, np.float32)
        x.swapaxes(1, 2)[table[token.any(2)]] = np.where(
            token[token.any(2)][..., None, None],
            normal(seed, token.any(2).sum(), C, K, size),
            np.nan,
        )
        return x

    arrays = dict(q=normal(0, B, T, N, H), k=pool(1, H), v=pool(2, V) if V else None)
    arrays |= dict(table=np.where(token.any(2), table, 10**6), lengths=np.asarray(lengths))
    return arrays | (dict(sinks=normal(3, N)) if sinks else {})


def oracle(q, k, v, table, lengths, *, scale, value_dim=None, q_offset=None, softcap=None,
           sinks=None, window=None):  # fmt: skip
    """One query and head after the other, in float64."""
    (B, T, N, _), K = q.shape, k.shape[1]
    values = k[..., :value_dim] if v is None else v
    o, lse = np.zeros((B, T, N, values.shape[-1])), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        at = t + (lengths[b] - T if q_offset is None else q_offset[b])
        first = 0 if window is None else max(at - window, 0)
        own = [(table[b, s // C], s % C) for s in range(first, min(at + 1, lengths[b]))]
        keys, inside = (
            np.array([x[p, n * K // N, i] for p, i in own], np.float64) for x in (k, values)
        )
        y = [scale * (key @ q[b, t, n].astype(np.float64)) for key in keys]
        y = y if softcap is None else [softcap * np.tanh(x / softcap) for x in y]
        total = np.array([*y, *([] if sinks is None else [sinks[n]])])
        if len(total):
            lse[b, t, n] = total.max() + np.log(np.exp(total - total.max()).sum())
            o[b, t, n] = sum(np.exp(x - lse[b, t, n]) * v for x, v in zip(y, inside, strict=True))
    return o, lse


CASES = {
    "several queries, one key head": (inputs(T=3, K=1), dict(window=5)),
    "one query, everything": (inputs(sinks=True), dict(window=9, softcap=2.0)),
    "latent": (inputs(K=1, H=9, V=None, sinks=True), dict(value_dim=6)),
    "queries elsewhere": (inputs(T=3, K=4), dict(q_offset=np.array([2, 0, 5, 1, 6, 9, -2]))),
}


@functools.cache
def every_way(case):
    """A program by XLA in one part and in two, and by the kernel in two."""

    def run(arrays, implementation, splits):
        more = dict(implementation=implementation, splits=splits, scale=0.7)
        return kernels.decode_attention(**arrays, **CASES[case][1], **more)

    ways = ("xla", 1), ("xla", 2), ("interpret", 2)
    return jax.jit(lambda arrays: {f"{way}": run(arrays, *way) for way in ways})


@pytest.mark.parametrize("case", CASES)
def test_equals_dense(case):
    arrays, options = CASES[case]
    found, expected = every_way(case)(arrays), oracle(**arrays, **options, scale=0.7)
    chex.assert_trees_all_close(found, dict.fromkeys(found, expected), rtol=1e-5, atol=2e-6)


def test_large_scores():
    case = "several queries, one key head"
    arrays, options = CASES[case]
    arrays = arrays | dict(q=140 * arrays["q"])
    expected = oracle(**arrays, **options, scale=0.7)
    # scores of some hundreds have errors of some 1e-5 in float32, and so has what is made of them
    for actual in every_way(case)(arrays).values():
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-4)


def naive(q, k, v, table, lengths):
    """Everything in the dtype of the inputs, for sequences that are full."""
    k, v = (x[table].swapaxes(2, 3).reshape(len(q), C * L, 2, -1) for x in (k, v))
    k, v = (jnp.repeat(x, 2, 2) for x in (k, v))
    x = jnp.einsum("btnh,bsnh->bnts", q, k) * jnp.asarray(0.7, q.dtype)
    return jnp.einsum("bnts,bsnv->btnv", jax.nn.softmax(x), v)


def test_bfloat16_is_no_worse_than_naive():
    arrays = inputs(lengths=np.full(5, C * L), H=16, V=16)
    narrow = {name: jnp.asarray(x, jnp.bfloat16) for name, x in arrays.items() if name in "qkv"}
    wide = {name: x.astype(jnp.float32) for name, x in narrow.items()}
    attend = functools.partial(kernels.decode_attention, scale=0.7)

    def run(narrow, wide):
        found = [attend(**narrow, implementation=x)[0] for x in ("xla", "interpret")]
        return found, naive(**narrow), naive(**wide)

    found, bar, exact = jax.jit(run)(arrays | narrow, arrays | wide)
    rms = lambda x: np.sqrt(np.mean((np.float32(x) - exact) ** 2))
    for o in found:
        assert o.dtype == jnp.bfloat16 and rms(o) <= rms(bar)


def test_steps_are_those_of_each_sequence():
    """Whatever the table has room for: a step takes two pages, and each has one at least."""

    def count(window, splits):
        options, table = part.Options(1.0, None, window, 1, 2), np.zeros((7, 1000), int)
        sizes = dict(C=C, splits=splits, pages=2)
        return int(jax.jit(lambda x: steps.make(options, table, x, x - 1, **sizes)[1])(LENGTHS))

    assert count(None, 1) == 1 + 1 + 1 + 2 + 1 + 3 + 3
    assert count(None, 2) == 1 + 1 + 1 + 1 + 1 + 2 + 2
    assert count(7, 1) == 1 + 1 + 1 + 2 + 1 + 2 + 1  # the last of 23 sees 15 to 22, of 24 16 to 23


def test_pages_that_need_not_be_there_are_those_that_are():
    """A block that stays the same is not copied again."""
    options, table = part.Options(1.0, None, None, 1, 2), np.arange(12).reshape(2, 6)

    @jax.jit
    def run(lengths):
        args = jnp.asarray(table), lengths, lengths - 1
        made, count = steps.make(options, *args, C=C, splits=1, pages=4)
        return count, [[made.page(0, step, 4, i, C) for step in range(3)] for i in range(4)]

    count, pages = jax.device_get(run(np.array([9, 24])))  # three pages and six
    assert count == 3
    assert pages[:2] == [[0, 6, 10], [1, 7, 11]] and pages[2] == [2, 8, 8]
    assert pages[3][1:] == [9, 9]


def test_has_no_races(capfd):
    """With memory that is NaN until it is written, and the pipeline's copies simulated."""
    arrays = inputs(lengths=np.array([9, 0, 24]))
    params = pltpu.InterpretParams(detect_races=True)

    @jax.jit
    def run(q, k, v, table, lengths):
        rows = q.reshape(3, 2, 2, 8)
        options, starts = part.Options(0.7, None, None, 1, 2), lengths - 1
        o, lse = mosaic_tpu.attend(
            options, rows, k, v, table, lengths, starts, V=6, splits=2, interpret=params
        )
        return o.reshape(3, 1, 4, 6), lse.reshape(3, 1, 4)

    expected = oracle(**arrays, scale=0.7)
    chex.assert_trees_all_close(run(**arrays), expected, rtol=1e-5, atol=2e-6)
    assert "race" not in capfd.readouterr().out.lower()


def test_heads_over_devices_equal_one_device():
    mesh, P = sharding.make_mesh(tensor=4), jax.P
    arrays = inputs(N=8, K=4)
    run = lambda arrays: kernels.decode_attention(**arrays, scale=0.7)
    q, pages = P(None, None, "tensor"), P(None, "tensor")
    places = dict(q=q, k=pages, v=pages, table=P(), lengths=P())
    split = jax.shard_map(run, mesh=mesh, in_specs=(places,), out_specs=(q, q))
    actual, expected = jax.jit(lambda arrays: (split(arrays), run(arrays)))(arrays)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def shapes(*, T=1, C=16, K=2, dtype="bfloat16", B=4):
    x = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    pages = x(dtype, 64, K, C, 64)
    integers = dict(table=x("int32", B, 16), lengths=x("int32", B))
    return dict(q=x(dtype, B, T, 2 * K, 64), k=pages, v=pages) | integers


@pytest.mark.parametrize(
    ("options", "count"), [({}, 1), (dict(T=4096), 0), (dict(C=4096, K=16), 0), (dict(B=2**13), 0)]
)
def test_default_is_the_kernel_on_tpu_where_it_fits(options, count, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(placing, "whole", lambda: True)
    run = jax.jit(functools.partial(kernels.decode_attention, scale=1.0))
    export = lambda platform: jax.export.export(run, platforms=[platform])(**shapes(**options))
    assert export("tpu").mlir_module().count("tpu_custom_call") == count
    if count:
        assert "custom_call" not in export("cpu").mlir_module()
    else:
        with pytest.raises(NotImplementedError, match="don't fit the memory of the kernel for TPU"):
            asked = functools.partial(kernels.decode_attention, implementation="pallas", scale=1.0)
            jax.export.export(jax.jit(asked), platforms=["tpu"])(**shapes(**options))


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_has_no_derivative_and_says_so(implementation):
    attend = functools.partial(kernels.decode_attention, scale=1.0, implementation=implementation)
    loss = lambda q, rest: attend(q, **rest)[0].sum()
    rest = inputs()
    with pytest.raises(NotImplementedError, match="has no derivative; dot_product_attention has"):
        jax.eval_shape(jax.grad(loss), rest.pop("q"), rest)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(q=np.zeros((7, 1, 3, 8), "f")), "3 query heads must be a multiple of 2 key heads"),
        (dict(q=np.zeros((7, 1, 4, 9), "f")), "shapes don't fit: q"),
        (dict(q=np.zeros((7, 0, 4, 8), "f")), "nothing may be empty: q"),
        (dict(q=np.zeros((7, 1, 4, 8), "half")), "queries of float16 must have .* float32"),
        (dict(v=np.zeros((42, 1, C, 6), "f")), r"shapes don't fit: .* of v \(42, 1, 4, 6\)"),
        (dict(v=None), "value_dim=None must be given without v, and only then"),
        (dict(value_dim=6), "value_dim=6 must be given without v, and only then"),
        (dict(v=None, value_dim=9), "value_dim=9 must be from 1 to the 8 features of a key"),
        (dict(lengths=LENGTHS + 1), "must be from 0 to 24, which the table has room for"),
        (dict(lengths=LENGTHS - 1), "must be from 0 to 24, which the table has room for"),
        (dict(lengths=LENGTHS[1:]), r"lengths of shape \(6,\) must have shape \(7,\)"),
        (dict(lengths=LENGTHS * 1.0), "lengths of float64 must be integers"),
        (dict(table=np.zeros((6, L), int)), r"table of shape \(6, 6\) must have shape \(7, 6\)"),
        (dict(sinks=np.zeros(2)), r"sinks of shape \(2,\) must have shape \(4,\)"),
        (dict(q_offset=np.zeros(2, int)), r"q_offset of shape \(2,\) must have shape \(7,\)"),
        (dict(window=-1), "window=-1 must not be negative"),
        (dict(splits=0), "splits=0 must be at least 1"),
        (dict(implementation="triton"), "implementation='triton' must be one of"),
    ],
)
def test_wrong_arguments_raise(wrong, message):
    unchecked = inspect.unwrap(kernels.decode_attention)  # by the annotations, as outside of tests
    with pytest.raises(ValueError, match=message):
        unchecked(**inputs() | dict(scale=1.0) | wrong)
