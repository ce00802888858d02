"""Only what is particular to MMInference; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.softmax import multi_head_attention as mha
from attnjax.sparse import mminference as lib
from tests import cost

KEY = jax.random.key(0)
T = 120
NEAR = dict(sinks=2, window=3)
lag = np.arange(T)[:, None] - np.arange(T)[None]


def example(T=T):
    return lib.SPEC.example(KEY, T).values()


def video(stride, phase, noise=1.0):
    """A head whose queries look at keys with (t - s) mod stride = phase."""
    place = lambda t: jax.nn.one_hot(jnp.asarray(t) % stride, 16)
    q, k = 24 * place(np.arange(T) - phase), place(np.arange(T))
    extra = noise * jax.random.normal(jax.random.fold_in(KEY, 31 * stride + phase), (2, T, 16))
    return (q + extra[0])[:, None], (k + 0.1 * extra[1])[:, None]


def seen_by(stride, phase):
    """What a head with this grid sees (T T)."""
    grid = (lag % stride == phase) | (lag < NEAR["window"]) | (np.arange(T) < NEAR["sinks"])[None]
    return grid & (lag >= 0)


def weights(q, k):
    x = jnp.einsum("TNH,SNH->NTS", q, k)[0] * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(lag >= 0, x, -jnp.inf))


def run(*args, **options):
    return jax.jit(functools.partial(lib.mminference, **(NEAR | dict(last=16) | options)))(*args)


def test_finds_the_stride_and_the_phase():
    strides = (5, 8, 10, 16)
    planted = [(c, p) for c in strides for p in range(0, c, 2)]
    q, k = (jnp.stack(x, 1)[None, :, :, 0] for x in zip(*(video(*x) for x in planted), strict=True))
    find = functools.partial(lib.find_grid, strides=strides, last=16, **NEAR)
    stride, phase = jax.jit(find)(q, k)
    found = zip(np.array(strides)[stride[0]], phase[0].tolist(), strict=True)
    assert np.mean([tuple(a) == b for a, b in zip(found, planted, strict=True)]) > 0.95


@pytest.mark.parametrize("phase", [0, 1, 4])
def test_lines_are_attention_by_a_dense_mask(phase):
    T = 23
    q, k, v = jax.random.normal(KEY, (3, T, 4))
    lag = np.arange(T)[:, None] - np.arange(T)[None]
    mask = masks.Dense(jnp.asarray((lag >= 0) & (lag % 5 == phase))[None, None])
    expected = ops.dot_product_attention(
        *(x[None, :, None] for x in (q, k, v)), mask=mask, return_lse=True
    )
    actual = jax.jit(functools.partial(lib.on_lines, stride=5))(q, k, v, phase)
    chex.assert_trees_all_close(actual, tuple(x[0, :, 0] for x in expected), rtol=1e-5, atol=1e-6)


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
    recall = lambda seen: float(jnp.where(seen & (lag >= 0), w, 0).sum(-1)[60:].mean())
    assert recall(grid) > 0.9 > 0.5 > max(recall(near), recall(at_random))
    found, phase = lib.find_grid(q[None], k[None], (7, 10), last=16, **NEAR)
    assert (found.item(), phase.item()) == (1, 0)


def test_every_head_has_its_pattern():
    (q0, k0), (q1, k1), (q2, k2) = video(8, 0), video(10, 2), video(5, 0)
    q, k = (jnp.concatenate(x, 1)[None] for x in ((q0, q1, q1, q2), (k0, k1, k1, k2)))
    v = jax.random.normal(KEY, k.shape)
    names = ("grid", "grid", "full", "a_shape")
    near = (lag >= 0) & ((lag < NEAR["window"]) | (np.arange(T) < NEAR["sinks"])[None])
    seen = np.stack([seen_by(8, 0), seen_by(10, 2), lag >= 0, near])
    expected = ops.dot_product_attention(q, k, v, mask=masks.Dense(jnp.asarray(seen)[None]))
    o = run(q, k, v, patterns=names, strides=(8, 10))
    chex.assert_trees_all_close(o, expected, rtol=1e-4, atol=1e-5)


def test_text_sees_all_and_is_seen_by_all():
    q, k, v = example()
    run_text = functools.partial(run, patterns="a_shape", text=((30, 34), (80, 81)))
    words = np.isin(np.arange(T), [30, 31, 32, 33, 80])
    near = (lag < NEAR["window"]) | (np.arange(T) < NEAR["sinks"])[None]
    seen = (lag >= 0) & (near | words[None] | words[:, None])
    expected = ops.dot_product_attention(q, k, v, mask=masks.Dense(jnp.asarray(seen)[None, None]))
    chex.assert_trees_all_close(run_text(q, k, v), expected, rtol=1e-5, atol=1e-6)


def test_more_lines_are_less_error():
    q, k, v = example()
    full = ops.dot_product_attention(q, k, v, mask=masks.Causal())
    errors = [float(jnp.abs(run(q, k, v, strides=(c,)) - full).mean()) for c in (12, 4, 1)]
    assert errors == sorted(errors)[::-1] and errors[-1] < 1e-6 < errors[-2]


def test_no_query_sees_a_later_key_nor_is_left_without_one():
    q, k, v = example(41)
    options = dict(strides=(4,), sinks=0, window=1, last=8)
    ones = run(q, k, jnp.ones_like(v), **options)
    chex.assert_trees_all_close(ones, jnp.ones_like(ones), rtol=1e-5)
    grad = jax.grad(lambda v: (run(q, k, v, **options)[:, 20] ** 2).sum())(v)
    assert grad[:, :21].any() and not grad[:, 21:].any()


def test_is_a_function_of_multi_head_attention():
    few = functools.partial(lib.mminference, patterns="a_shape", sinks=1, window=2)
    x = jax.random.normal(KEY, (2, 12, 16))

    @jax.jit
    def outputs(x):
        module, causal = mha.MultiHeadAttention(num_heads=2, head_dim=8), masks.Causal()
        params, sparse = module.init(KEY, x), module.clone(fn=few)
        state = module.apply(params, 2, 12, method="init_state")
        _, steps = sparse.apply(params, state, x, method="extend")
        return module.apply(params, x, mask=causal), sparse.apply(params, x, mask=causal), steps

    full, sparse, steps = outputs(x)
    chex.assert_trees_all_close(steps, full, rtol=1e-5, atol=1e-6)
    assert jnp.abs(sparse - full).max() > 1e-2


def test_refuses_what_it_cannot_do():
    q, k, v = example(6)
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
