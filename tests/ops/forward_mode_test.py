"""Forward-mode derivatives against those of the dense form, and what they leave reverse mode."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import blocked_attention, blocked_schedule, dropout, forward_mode
from attnjax.ops import dot_product_attention as ops
from pallas_kernels import flash_attention as kernels


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, and a part of one, at tiny lengths."""
    small = lambda *arrays, sheets: [kernels.Sizes(16, 16, 2**20)]
    monkeypatch.setattr(kernels, "choices", small)
    monkeypatch.setattr(blocked_schedule, "_TILE", 16)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def inputs(T=35, **more):
    return {"q": normal(0, 2, T, 4, 8), "k": normal(1, 2, T, 2, 8), "v": normal(2, 2, T, 2, 5)} | {
        name: normal(3, *shape) for name, shape in more.items()
    }


def tangents(arrays):
    return {name: normal(10 + i, *x.shape) for i, (name, x) in enumerate(arrays.items())}


def attend(arrays, implementation, **options):
    """(o, lse), with a score_mod of slopes by head if there are any."""
    arrays = dict(arrays)
    if "slopes" in arrays:
        slopes = arrays.pop("slopes")
        options["score_mod"] = lambda x, b, n, t, s: x * (1 + 0.1 * b) - slopes[n] * abs(t - s) / 9
    qkv = [arrays.pop(name) for name in "qkv"]
    options |= dict(implementation=implementation, return_lse=True)
    return ops.dot_product_attention(*qkv, **arrays, **options)


def assert_close(actual, expected):
    """Within a few roundings of what the sums are made of."""

    def check(x, y):
        finite = np.where(np.isfinite(y), y, 0)
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.sqrt(np.mean(finite**2)) + 1e-6)

    jax.tree.map(check, actual, expected)


CAUSAL = masks.Causal()
SEGMENTS = masks.Segments(jnp.asarray(np.repeat([[0, 1, 2], [0, 3, 3]], [9, 20, 6], axis=1)))
SHORT = masks.Window(3, 0) & masks.Valid(jnp.arange(35)[None] < jnp.array([[0], [9]]))
CASES = {
    "everything": (
        dict(bias=(1, 4, 35, 1), sinks=(4,), slopes=(4,)),
        dict(mask=SEGMENTS & masks.Window(12, 3), softcap=3.0)
        | dict(dropout=dropout.Dropout(0.3, jax.random.key(3))),
    ),
    "nothing seen": (dict(bias=(1, 1, 35, 35)), dict(mask=SHORT)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_dense(case):
    arrays, options = inputs(**CASES[case][0]), CASES[case][1]
    push = lambda arrays, moved, x: jax.jvp(lambda a: attend(a, x, **options), (arrays,), (moved,))
    both = lambda *args: [push(*args, name) for name in ("blocked", "dense")]
    assert_close(*jax.jit(both)(arrays, tangents(arrays)))


def test_derivatives_of_gradients_equal_dense():
    """By the tiles of XLA, for a kernel too."""
    arrays, moved = inputs(T=20), normal(9, 2, 20, 4, 8)

    def push(implementation, arrays, moved):
        def loss(q):
            o, lse = attend(arrays | {"q": q}, implementation, mask=CAUSAL)
            return (o**2).sum() + jnp.sin(lse).sum()

        return jax.jvp(jax.grad(loss), (arrays["q"],), (moved,))

    both = lambda *args: [push(name, *args) for name in ("interpret", "dense")]
    assert_close(*jax.jit(both)(arrays, moved))


def test_within_other_transformations():
    """Mapped with an array that is shared, computed again, scanned and over devices."""
    q, k, v = (normal(i, 4, 1, 20, 2, 8) for i in range(3))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(implementation, q, k, v):
        options = dict(mask=CAUSAL, implementation=implementation)
        attend = functools.partial(ops.dot_product_attention, **options)
        mapped = jax.checkpoint(jax.vmap(attend, (0, None, 0)))
        scanned = lambda q, v: jax.lax.scan(lambda q, k: (mapped(q, k, v), None), q, k[:2])[0]
        if implementation == "blocked":  # on one device there is nothing else to compare
            by = jax.P("data")
            scanned = jax.shard_map(scanned, mesh=mesh, in_specs=by, out_specs=by)
        return jax.jvp(scanned, (q, v), (v, q))

    both = lambda *args: [run(name, *args) for name in ("blocked", "dense")]
    assert_close(*jax.jit(both)(q, k, v))


def test_reverse_mode_keeps_what_it_needs_once():
    arrays = inputs()
    keep = lambda a: jax.vjp(functools.partial(attend, implementation="interpret"), a)[1]
    kept = [x.shape for x in jax.tree.leaves(jax.eval_shape(keep, arrays))]
    o, lse = (2, 35, 4, 5), (2, 35, 4)
    positions = [(35,)] * 2
    assert sorted(kept) == sorted([*(x.shape for x in arrays.values()), o, lse, *positions])


def test_nothing_is_as_large_as_the_scores():
    q = jax.ShapeDtypeStruct((1, 261, 2, 8), jnp.float32)
    fn = functools.partial(ops.dot_product_attention, implementation="blocked")
    lowered = jax.jit(lambda *args: jax.jvp(fn, args, args)).lower(q, q, q).as_text()
    shapes = re.findall(r"tensor<((?:\d+x)+)", lowered)
    largest = max(math.prod(map(int, x[:-1].split("x"))) for x in shapes)
    assert q.size <= largest < 2 * q.size


def test_an_implementation_without_lse():
    """Its lse is made again."""
    arrays, at = inputs(T=20), np.arange(20)
    options = dict(mask=CAUSAL, bias=None, scale=0.3, softcap=None, sinks=None, dropout=None)
    full = blocked_attention.blocked_attention
    blind = lambda *args, **options: (full(*args, **options)[0], None)

    def run(attend, *qkv):
        attend = forward_mode.with_forward_mode(attend)
        fn = lambda *qkv: attend(*qkv, at, at, score_mod=None, **options)[0]
        return jax.jvp(fn, qkv, qkv)

    both = lambda *qkv: [run(fn, *qkv) for fn in (blind, full)]
    assert_close(*jax.jit(both)(*(arrays[name] for name in "qkv")))


def test_reverse_mode_of_derivatives_says_what_can():
    q = jax.ShapeDtypeStruct((1, 20, 1, 8), jnp.float32)
    attend = lambda q: (ops.dot_product_attention(q, q, q, implementation="blocked") ** 2).sum()
    twice = jax.grad(lambda q: jax.grad(attend)(q).sum())
    with pytest.raises(NotImplementedError, match="implementation='dense'"):
        jax.eval_shape(twice, q)


def test_a_kernel_is_refused_where_it_is_lowered():
    q = jnp.zeros((1, 20, 1, 8))
    attend = functools.partial(ops.dot_product_attention, implementation="pallas")
    with pytest.raises(NotImplementedError, match="implementation='interpret' runs"):
        jax.jit(lambda q: jax.jvp(attend, (q, q, q), (q, q, q)))(q)
