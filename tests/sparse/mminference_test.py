"""Only what is particular to MMInference; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks
from attnjax.ops import dot_product_attention as ops
from attnjax.softmax import multi_head_attention as mha
from attnjax.sparse import mminference as lib
from tests import cost
from tests.initial import initial
from tests.sparse import helpers

T = 120
NEAR = dict(sinks=2, window=3)
lag = np.arange(T)[:, None] - np.arange(T)[None]


def video(stride, phase, noise=1.0):
    """A head whose queries look at keys with (t - s) mod stride = phase."""
    place = lambda t: helpers.one_hot(t % stride, 16)
    q, k = 24 * place(np.arange(T) - phase), place(np.arange(T))
    extra = np.float32(noise) * helpers.normal(2, T, 16, seed=31 * stride + phase)
    return (q + extra[0])[:, None], (k + 0.1 * extra[1])[:, None]


def seen_by(stride, phase):
    """What a head with this grid sees (T T)."""
    grid = (lag % stride == phase) | (lag < NEAR["window"]) | (np.arange(T) < NEAR["sinks"])[None]
    return grid & (lag >= 0)


def weights(q, k):
    x = np.einsum("TNH,SNH->NTS", q, k)[0] * q.shape[-1] ** -0.5
    w = np.exp(np.where(lag >= 0, x, -np.inf))
    return w / w.sum(-1, keepdims=True)


def run(*args, **options):
    return helpers.program(lib.mminference, **(NEAR | dict(last=16) | options))(*args)


def by_mask(seen, *args):
    """Attention where `seen` (N T T) says so."""
    attend = lambda seen, *args: ops.dot_product_attention(*args, mask=masks.Dense(seen[None]))
    return helpers.program(attend)(seen, *args)


def test_finds_the_stride_and_the_phase():
    strides = (5, 8, 10, 16)
    planted = [(c, p) for c in strides for p in range(0, c, 2)]
    q, k = (np.stack(x, 1)[None, :, :, 0] for x in zip(*(video(*x) for x in planted), strict=True))
    stride, phase = helpers.program(lib.find_grid, strides=strides, last=16, **NEAR)(q, k)
    found = zip(np.array(strides)[stride[0]], phase[0].tolist(), strict=True)
    assert np.mean([tuple(a) == b for a, b in zip(found, planted, strict=True)]) > 0.95


@pytest.mark.parametrize("phase", [0, 1, 4])
def test_lines_are_attention_by_a_dense_mask(phase):
    lag = np.arange(23)[:, None] - np.arange(23)[None]
    seen, qkv = (lag >= 0) & (lag % 5 == phase), tuple(helpers.normal(3, 23, 4))
    actual, expected = helpers.program(on_lines_and_by_mask)(*qkv, np.int32(phase), seen)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def on_lines_and_by_mask(q, k, v, phase, seen):
    qkv = (x[None, :, None] for x in (q, k, v))
    mask = masks.Dense(seen[None, None])
    expected = ops.dot_product_attention(*qkv, mask=mask, return_lse=True)
    return lib.on_lines(q, k, v, phase, stride=5), tuple(x[0, :, 0] for x in expected)


def test_lines_cost_a_share_of_attention():
    x = jax.ShapeDtypeStruct((4096, 64), jnp.float32)
    count = lambda stride: cost.operations(
        functools.partial(lib.on_lines, stride=stride), x, x, x, 3
    )
    full = functools.partial(ops.dot_product_attention, implementation="dense")
    whole = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.float32)
    assert count(32) < cost.operations(full, whole, whole, whole) / 20
    assert count(64) < 0.6 * count(32)


def test_a_grid_holds_more_of_a_video_than_as_many_near_or_random_keys():
    q, k = video(10, 0)
    w, grid = weights(q, k), seen_by(10, 0)
    count = grid.sum(-1)
    near = (lag >= 0) & (lag < (count - NEAR["sinks"])[:, None]) | (np.arange(T) < 2)[None]
    noise = np.where(lag >= 0, np.random.default_rng(0).random((T, T)), -1)
    at_random = np.argsort(np.argsort(-noise)) < count[:, None]
    recall = lambda seen: float(np.where(seen & (lag >= 0), w, 0).sum(-1)[60:].mean())
    assert recall(grid) > 0.9 > 0.5 > max(recall(near), recall(at_random))


def test_every_head_has_its_pattern():
    (q0, k0), (q1, k1), (q2, k2) = video(8, 0), video(10, 2), video(5, 0)
    q, k = (np.concatenate(x, 1)[None] for x in ((q0, q1, q1, q2), (k0, k1, k1, k2)))
    v = helpers.normal(*k.shape)
    names = ("grid", "grid", "full", "a_shape")
    near = (lag >= 0) & ((lag < NEAR["window"]) | (np.arange(T) < NEAR["sinks"])[None])
    seen = np.stack([seen_by(8, 0), seen_by(10, 2), lag >= 0, near])
    o = run(q, k, v, patterns=names, strides=(8, 10))
    chex.assert_trees_all_close(o, by_mask(seen, q, k, v), rtol=1e-4, atol=1e-5)


def test_text_sees_all_and_is_seen_by_all():
    q, k, v = helpers.example(T)
    words = np.isin(np.arange(T), [30, 31, 32, 33, 80])
    near = (lag < NEAR["window"]) | (np.arange(T) < NEAR["sinks"])[None]
    seen = (lag >= 0) & (near | words[None] | words[:, None])
    o = run(q, k, v, patterns="a_shape", text=((30, 34), (80, 81)))
    chex.assert_trees_all_close(o, by_mask(seen[None], q, k, v), rtol=1e-5, atol=1e-6)


def test_more_lines_are_less_error():
    q, k, v = helpers.example(T)
    full = helpers.causal(q, k, v)
    errors = [float(np.abs(run(q, k, v, strides=(c,)) - full).mean()) for c in (12, 4, 1)]
    assert errors == sorted(errors)[::-1] and errors[-1] < 1e-6 < errors[-2]


def test_no_query_sees_a_later_key_nor_is_left_without_one():
    """By the weights: the outputs for values that are the identity."""
    matrix = functools.partial(edit.matrix, lib.mminference)
    options = dict(strides=(4,), sinks=0, window=1, last=8)
    w = helpers.program(matrix, **options)(*helpers.example(41))
    chex.assert_trees_all_close(w.sum(-1), np.ones_like(w[..., 0]), rtol=1e-5)
    assert w[:, :, 20, :21].any() and not np.triu(w, 1).any()


def test_is_a_function_of_multi_head_attention():
    few = functools.partial(lib.mminference, patterns="a_shape", sinks=1, window=2)
    module, x = mha.MultiHeadAttention(num_heads=2, head_dim=8), helpers.normal(2, 12, 16)

    def outputs(params, x):
        causal, sparse = masks.Causal(), module.clone(fn=few)
        state = module.apply(params, 2, 12, method="init_state")
        _, steps = sparse.apply(params, state, x, method="extend")
        return module.apply(params, x, mask=causal), sparse.apply(params, x, mask=causal), steps

    params = initial(module.init, helpers.KEY, x)
    full, sparse, steps = helpers.program(outputs)(params, x)
    chex.assert_trees_all_close(steps, full, rtol=1e-5, atol=1e-6)
    assert np.abs(sparse - full).max() > 1e-2


def test_refuses_what_it_cannot_do():
    q, k, v = (jnp.asarray(x) for x in helpers.example(6))
    with pytest.raises(NotImplementedError, match="mminference can't honour Window"):
        lib.mminference(q, k, v, mask=masks.Window(2))
    for patterns in ("vertical", ("grid",), ("grid", "grid", "grid", "dense")):
        with pytest.raises(ValueError, match="must be 4 of"):
            lib.mminference(q, k, v, patterns=patterns)
    for options in (dict(strides=()), dict(strides=(0,)), dict(window=0), dict(last=0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            lib.mminference(q, k, v, **options)
    with pytest.raises(ValueError, match="must be of the tokens of"):
        lib.mminference(q[:, :3], k, v)
