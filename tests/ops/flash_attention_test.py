"""The kernel, interpreted, against the dense form: outputs and gradients, every option and mask."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnjax import parallel
from attnjax.core import masks, registry
from attnjax.ops import dense_attention, dropout, flash_attention
from attnjax.ops import dot_product_attention as ops
from pallas_kernels import flash_attention as kernels
from pallas_kernels import placing
from tests.parallel import helpers


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, and a part of one, at tiny lengths."""
    small = lambda *arrays, sheets: [kernels.Sizes(16, 16, 2**20)]
    monkeypatch.setattr(kernels, "choices", small)
    monkeypatch.setattr(kernels, "LANES", 16)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def inputs(B=2, T=35, S=35, N=4, K=2, H=8, V=8, bias=None, sinks=False):
    arrays = {"q": normal(0, B, T, N, H), "k": normal(1, B, S, K, H), "v": normal(2, B, S, K, V)}
    arrays |= {} if bias is None else {"bias": normal(3, *bias)}
    return arrays | ({"sinks": normal(4, N)} if sinks else {})


def modifying(slopes, cap):
    """A score_mod of slopes by distance for each head, and a bound that is learned."""

    def score_mod(x, b, n, t, s):
        bounded = cap[0] * jnp.tanh(x / cap[0]) - 0.1 * slopes[n] * abs(t - s)
        return jnp.where((t % 3 == 0) & (n > 1), bounded, x * (1 + 0.1 * b))

    return score_mod


def with_gradients(implementation, arrays, **options):
    """((o, lse), gradients of every array), by random cotangents of all that is finite."""

    def loss(arrays):
        arrays = dict(arrays)
        if "slopes" in arrays:
            options["score_mod"] = modifying(arrays.pop("slopes"), arrays.pop("cap"))
        qkv = [arrays.pop(name) for name in "qkv"]
        options_of = dict(implementation=implementation, return_lse=True)
        o, lse = ops.dot_product_attention(*qkv, **arrays, **options, **options_of)
        finite = jnp.where(lse > -jnp.inf, lse, 0.0)
        return (o * normal(5, *o.shape)).sum() + (finite * normal(6, *lse.shape)).sum(), (o, lse)

    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
    return out, grads


@functools.cache
def of_case(case):
    """(a program of the kernel and of the dense form, what it gives)"""
    arrays, options = CASES[case]
    both = lambda arrays: [with_gradients(x, arrays, **options) for x in ("interpret", "dense")]
    run = jax.jit(both)
    return run, jax.device_get(run(arrays))


def assert_same(actual, expected):
    (out, grads), (expected_out, expected_grads) = actual, expected
    chex.assert_trees_all_close(out, expected_out, rtol=1e-5, atol=3e-6)
    for name, grad in expected_grads.items():
        atol = 1e-5 * np.sqrt(np.mean(grad**2)) + 1e-6
        np.testing.assert_allclose(grads[name], grad, rtol=1e-5, atol=atol, err_msg=name)


def documents(*lengths):
    return jnp.asarray(np.stack([np.repeat(np.arange(len(x)), x) for x in lengths]))


CAUSAL = masks.Causal()
SEGMENTS = masks.Segments(documents([9, 20, 6], [3, 16, 16]))
VALID = masks.Valid(jnp.arange(35)[None] < jnp.array([[35], [17]]))
PER_HEAD = masks.Dense(jnp.asarray(normal(7, 1, 4, 35, 35) > 1))
SELECTED = masks.Blocks(jnp.asarray(normal(8, 2, 4, 3, 3) > 0), 16, 16)
UNALIGNED = masks.Blocks(jnp.asarray(normal(9, 1, 1, 3, 3) > 0), 14, 14)
EVERY_OTHER = jnp.asarray([[[[1, 0], [0, 1], [1, 1]]]], bool)
GRID = masks.Neighborhood((5, 7), (2, 3), stride=(2, 1), dilation=(1, 2))
UNSEEN = masks.Window(3, 0) & masks.Valid(jnp.arange(35)[None] < jnp.array([[0], [9]]))
DROPOUT = dropout.Dropout(0.3, jax.random.key(3))

CASES = {
    "blocks alone, values wider": (
        inputs(T=48, S=48, V=12),
        dict(mask=masks.Blocks(EVERY_OTHER, 16, 32), scale=0.7),
    ),
    "lengths differ, one key head": (
        inputs(T=20, S=50, K=1),
        dict(mask=masks.Prefix(5) | masks.Window(20, 2), q_offset=jnp.array(30)),
    ),
    "one query, bias by key": (
        inputs(T=1, bias=(2, 1, 1, 35), sinks=True),
        dict(mask=VALID | masks.Window(0, 0)),
    ),
    "one key, bias by query": (inputs(S=1, bias=(2, 4, 35, 1)), {}),
    "everything": (
        inputs(V=5, bias=(1, 4, 35, 1), sinks=True),
        dict(mask=SEGMENTS & masks.Window(12, 3), softcap=3.0, dropout=DROPOUT),
    ),
    "bias of each score, a grid": (inputs(bias=(2, 4, 35, 35)), dict(mask=GRID)),
    "bias of all heads, nothing seen": (inputs(bias=(1, 1, 35, 35)), dict(mask=UNSEEN)),
    "blocks by head": (inputs(), dict(mask=SELECTED & CAUSAL & VALID)),
    "blocks within or, mask by head, bias of all scores of a head": (
        inputs(K=4, bias=(1, 4, 1, 1)),
        dict(mask=(SELECTED & UNALIGNED) | masks.Window(2, 1) | PER_HEAD),
    ),
    "score_mod": (
        inputs(bias=(2, 1, 1, 35)) | {"slopes": normal(8, 4), "cap": abs(normal(9, 1))},
        dict(mask=SEGMENTS, dropout=DROPOUT, softcap=3.0),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_dense(case):
    assert_same(*of_case(case)[1])


def test_a_query_that_sees_nothing():
    ((o, lse), grads), _ = of_case("bias of all heads, nothing seen")[1]
    assert (o[0] == 0).all() and (o[1, 12:] == 0).all() and (o[1, :12] != 0).all()
    assert (lse[0] == -np.inf).all() and (lse[1, 12:] == -np.inf).all()
    assert (grads["q"][0] == 0).all() and (grads["q"][1, 12:] == 0).all()
    assert (grads["k"][0] == 0).all() and (grads["v"][0] == 0).all()
    chex.assert_tree_all_finite(grads)


def test_large_scores():
    case = "lengths differ, one key head"
    run, arrays = of_case(case)[0], CASES[case][0]
    found, (expected_out, expected) = run(arrays | {"q": 100 * arrays["q"]})
    # scores of some hundreds have errors of some 1e-5 in float32, and so has what is made of them
    chex.assert_trees_all_close(found[0], expected_out, rtol=1e-5, atol=1e-4)
    for name, grad in expected.items():
        np.testing.assert_allclose(found[1][name], grad, atol=1e-4 * abs(grad).max())


def naive(arrays):
    """Everything in the dtype of the inputs."""
    q, k, v = (arrays[name] for name in "qkv")
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], 2) for x in (k, v))
    x = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bnts,bsnv->btnv", jax.nn.softmax(x), v)


def test_bfloat16_is_no_worse_than_naive():
    narrow = {name: x.astype(jnp.bfloat16) for name, x in inputs(H=16).items()}
    wide = {name: x.astype(np.float32) for name, x in narrow.items()}
    cotangent = jnp.asarray(normal(5, 2, 35, 4, 8))
    ours = lambda x: ops.dot_product_attention(x["q"], x["k"], x["v"], implementation="interpret")

    def run(fn, arrays):
        o, vjp = jax.vjp(fn, arrays)
        return o, vjp(cotangent.astype(o.dtype))[0]

    @jax.jit
    def runs(narrow, wide):
        pairs = (ours, narrow), (naive, narrow), (naive, wide)
        return [run(*pair) for pair in pairs]

    found, bar, exact = runs(narrow, wide)
    rms = lambda x, y: np.sqrt(np.mean((np.float32(x) - y) ** 2))
    worse = jax.tree.map(lambda x, bar, exact: rms(x, exact) > rms(bar, exact), found, bar, exact)
    assert not any(jax.tree.leaves(worse)) and found[0].dtype == jnp.bfloat16


def test_a_traced_selection_skips_the_other_keys():
    """Keys that are NaN poison whatever reads them, even under a weight of zero."""
    arrays, zeros = inputs(T=64, S=64), inputs(T=64, S=64)
    for name in "kv":
        arrays[name][:, 32:48], zeros[name][:, 32:48] = np.nan, 0.0

    @jax.jit
    def run_selected(selected):
        mask = masks.Blocks(selected, 16, 16) & CAUSAL
        by_kernel = with_gradients("interpret", arrays, mask=mask)
        return by_kernel, with_gradients("dense", zeros, mask=mask)

    assert_same(*run_selected(jnp.tile(jnp.arange(4) != 2, (1, 1, 4, 1))))


def test_pieces_of_a_sequence_give_the_whole():
    """With positions that are traced, as the devices of a striped ring hold them."""
    arrays = inputs(T=64, S=64)

    def merged(q, k, v, even, odd):
        options = dict(mask=CAUSAL, dropout=DROPOUT, return_lse=True, implementation="interpret")
        attend = functools.partial(ops.dot_product_attention, q[:, odd], **options)
        pieces = [attend(k[:, s], v[:, s], positions=(odd, s)) for s in (even, odd)]
        lse = jnp.logaddexp(*(lse for _, lse in pieces))
        return sum(o * jnp.exp(part - lse)[..., None] for o, part in pieces)

    def whole(q, k, v, even, odd):
        options = dict(mask=CAUSAL, dropout=DROPOUT, implementation="dense")
        return ops.dot_product_attention(q, k, v, **options)[:, odd]

    at = np.arange(0, 64, 2), np.arange(1, 64, 2)
    slope = lambda fn: jax.grad(lambda *x: (fn(*x) ** 2).sum(), (0, 1, 2))
    both = jax.jit(lambda *args: [slope(fn)(*args) for fn in (merged, whole)])
    chex.assert_trees_all_close(*both(*arrays.values(), *at), rtol=1e-5, atol=1e-5)


def test_a_ring_lowers_for_tpu(monkeypatch):
    """It can't be run here: the interpreter mixes arrays that vary over a mesh with others."""
    monkeypatch.undo()  # a TPU has no tiles as small
    record = dataclasses.replace(registry.get("multi_head_attention"), fn=ops.dot_product_attention)
    ring = parallel.shard("ring", record, helpers.mesh(context=2, tensor=2))
    run = helpers.with_gradients(ring, mask=SEGMENTS & CAUSAL, implementation="pallas")
    lowered = run.trace(*inputs().values()).lower(lowering_platforms=("tpu",))
    for kernel in ("flash_attention", "flash_attention_dq", "flash_attention_dkv"):
        assert f'kernel_name = "{kernel}"' in lowered.as_text()


def test_has_no_races(capfd):
    """With memory that is NaN until it is written, and the pipeline's copies simulated."""
    params = pltpu.InterpretParams(detect_races=True)
    simulated = functools.partial(flash_attention.flash_attention, interpret=params)
    fns = simulated, dense_attention.dense_attention
    arrays = inputs(B=1, T=20, S=20, N=2, K=1, bias=(1, 1, 20, 20), sinks=True)
    options = dict(mask=CAUSAL, scale=1.0, softcap=None, dropout=None, score_mod=None)
    at = np.arange(20)

    def run(fn, arrays):
        attend = lambda q, k, v, bias, sinks: fn(q, k, v, at, at, bias=bias, sinks=sinks, **options)
        o, vjp = jax.vjp(lambda arrays: attend(**arrays)[0], arrays)
        return o, vjp(jnp.asarray(normal(5, *o.shape)))

    both = jax.jit(lambda arrays: [run(fn, arrays) for fn in fns])
    chex.assert_trees_all_close(*both(arrays), rtol=1e-5, atol=1e-5)
    assert "race" not in capfd.readouterr().out.lower()


@pytest.mark.parametrize("by_position", [
    lambda x, b, n, t, s: x + jnp.arange(9.0)[abs(t - s)],
    lambda x, b, n, t, s: x + jnp.dot(jnp.arange(4.0), jnp.full(4, 1.0 * t)),
])  # fmt: skip
def test_a_score_mod_that_looks_up_needs_another_implementation(by_position):
    q = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(NotImplementedError, match="implementation='blocked' can, and a bias"):
        ops.dot_product_attention(q, q, q, score_mod=by_position, implementation="interpret")


@pytest.mark.parametrize(
    ("T", "S", "options", "kernels_for_tpu"),
    [
        (512, 300, dict(mask=CAUSAL), 3),
        (256, 256, {}, 0),  # dense
        (16, 8192, {}, 0),  # blocked: a tile would be mostly padding
        (512, 300, dict(score_mod=lambda x, b, n, t, s: x - jnp.ones(2)[n] * (t - s)), 3),
        (512, 300, dict(score_mod=lambda x, b, n, t, s: x + jnp.ones(512)[t]), 0),
    ],
)
def test_default_is_the_kernel_on_tpu(monkeypatch, T, S, options, kernels_for_tpu):
    monkeypatch.undo()
    monkeypatch.setattr(placing, "whole", lambda: True)
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 64), jnp.bfloat16) for n in (T, S))
    loss = lambda q, k: ops.dot_product_attention(q, k, k, **options).astype(jnp.float32).sum()
    grad = jax.jit(jax.grad(loss, (0, 1)))
    export = lambda platform: jax.export.export(grad, platforms=[platform])(q, k).mlir_module()
    assert export("tpu").count("tpu_custom_call") == kernels_for_tpu
    if "mask" in options:
        assert "custom_call" not in export("cpu")
