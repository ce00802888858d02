"""Neighborhoods against loops over coordinates, the limits of GNA, and what a stride saves."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks, registry
from attnjax.ops import dot_product_attention as ops
from attnjax.window.gna import Gna, gna
from tests import cost

KEY = jax.random.key(0)
ORACLE = registry.get("gna").oracle


def grid(*shape, B=1, N=2, H=4):
    return np.random.default_rng(0).normal(size=(3, B, *shape, N, H)).astype(np.float32)


def assert_same(actual, expected, *arrays):
    """Two functions of the same arrays."""
    run = jax.jit(lambda *arrays: (actual(*arrays), expected(*arrays)))
    chex.assert_trees_all_close(*run(*arrays), rtol=1e-5, atol=1e-6)


def full_attention(q, k, v, mask=None):
    flat = [x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (q, k, v)]
    return ops.dot_product_attention(*flat, mask=mask).reshape(v.shape)


def seen(shape, **options):
    """[queries, keys] which key has a weight."""
    run = jax.jit(lambda *qkv: edit.matrix(gna, *qkv, **options))
    return jax.device_get(run(*grid(*shape, N=1, H=1)))[0, 0] > 0


def sees(q, key, L, window, stride, dilation, causal):
    """Whether a query sees a key of one axis, in the words of the paper."""
    if q % dilation != key % dilation:
        return False
    last = (L - 1 - q % dilation) // dilation
    q, key = q // dilation, key // dilation
    first = q // stride * stride
    if causal:
        leader = min(first + stride - 1, last)
        return key <= q and leader - key < window
    leader = min(first + stride // 2, last)
    after = window // 2 + window % 2 - 1
    centre = max(window // 2, min(leader, last - after))
    return centre - window // 2 <= key <= centre + after


OPTIONS = [
    ((13,), (5,), (1,), (1,), (False,)),
    ((13,), (4,), (3,), (1,), (False,)),
    ((13,), (4,), (3,), (1,), (True,)),
    ((13,), (3,), (2,), (3,), (False,)),
    ((14,), (3,), (2,), (4,), (True,)),
    ((5, 7), (3, 4), (1, 4), (1, 1), (False, True)),
    ((6, 9), (2, 3), (2, 1), (3, 2), (True, False)),
    ((3, 4, 6), (3, 2, 3), (1, 2, 3), (1, 2, 1), (True, False, False)),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sees_what_the_rule_says(options):
    shape, window, stride, dilation, causal = options
    cells = list(np.ndindex(*shape))
    rule = lambda q, key: all(map(sees, q, key, *options))
    expected = [[rule(q, key) for key in cells] for q in cells]
    actual = seen(shape, window=window, stride=stride, dilation=dilation, causal=causal)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("options", [OPTIONS[4], OPTIONS[7]], ids=str)
def test_agrees_with_its_oracle_on_sequences_and_volumes(options):
    """The conformance tests do on grids."""
    shape, *values = options
    named = dict(zip(("window", "stride", "dilation", "causal"), values, strict=True))

    @jax.jit
    def both(qkv):
        pulls = [jax.vjp(lambda *x, f=f: f(*x, **named), *qkv) for f in (gna, ORACLE)]
        return [(o, pull(jnp.cos(o))) for o, pull in pulls]

    chex.assert_trees_all_close(*both(tuple(grid(*shape, B=2))), rtol=1e-4, atol=1e-5)


def test_stride_one_is_the_nearest_keys():
    distance = np.abs(np.arange(12)[:, None] - np.arange(12)[None, :])
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :5]
    expected = np.zeros((12, 12), bool)
    np.put_along_axis(expected, nearest, True, axis=1)
    np.testing.assert_array_equal(seen((12,), window=5), expected)


def test_stride_of_a_window_is_attention_within_blocks():
    def blocks(*qkv):
        cells = [x.reshape(1, 2, 3, 3, 3, 2, 4).swapaxes(2, 3) for x in qkv]
        o = full_attention(*(x.reshape(6, 3, 3, 2, 4) for x in cells))
        return o.reshape(1, 2, 3, 3, 3, 2, 4).swapaxes(2, 3).reshape(1, 6, 9, 2, 4)

    assert_same(functools.partial(gna, window=3, stride=3), blocks, *grid(6, 9))


@pytest.mark.parametrize(
    "shape, window", [((11,), 20), ((4, 4), 4), ((2, 3, 4), (2, 3, 4))], ids=str
)
def test_a_window_of_the_whole_grid_is_full_attention(shape, window):
    assert_same(functools.partial(gna, window=window), full_attention, *grid(*shape))


def test_a_larger_window_is_cut_on_each_axis_alone():
    of = lambda **options: functools.partial(gna, **options)
    actual = lambda *qkv: (of(window=5)(*qkv), of(window=5, dilation=20)(*qkv))
    assert_same(actual, lambda *qkv: (of(window=(3, 5))(*qkv), qkv[2]), *grid(3, 9))


def test_a_larger_window_is_cut_to_the_shortest_line():
    cut = masks.Neighborhood((7,), (3,), stride=(3,), dilation=(2,))  # lines of 4 and of 3
    actual = seen((7,), window=4, stride=4, dilation=2)
    np.testing.assert_array_equal(actual, np.asarray(masks.dense(cut, 7, 7))[0, 0])


def test_a_causal_line_is_a_sliding_window():
    window = functools.partial(full_attention, mask=masks.Window(left=3))
    assert_same(functools.partial(gna, window=4, causal=True), window, *grid(13))


def test_dilation_is_attention_within_each_remainder():
    def split(*qkv):
        lines = [gna(*(x[:, :, r::2] for x in qkv), window=3) for r in range(2)]
        return jnp.stack(lines, 3).reshape(qkv[2].shape)

    assert_same(functools.partial(gna, window=3, dilation=(1, 2)), split, *grid(7, 8))


def test_a_stride_of_a_window_computes_nothing_in_vain():
    """The least work: products of each query with its keys, and of their weights with values."""
    q, k, v = grid(16, 16, N=1, H=64)
    work = lambda **options: cost.operations(functools.partial(gna, window=4, **options), q, k, v)
    least = 2 * 2 * 16**2 * 4**2 * 64
    blocks, strides, sliding = work(stride=4), work(stride=2), work(stride=1)
    assert least < blocks < 1.4 * least
    assert 1.5 * blocks < strides < sliding


def test_groups_of_heads_share_keys():
    attend = functools.partial(gna, window=3)
    repeated = lambda q, k, v: attend(q, *(jnp.repeat(x, 2, axis=-2) for x in (k, v)))
    q, k, v = grid(6, 5, N=4)
    assert_same(attend, repeated, q, k[..., :2, :], v[..., :2, :])


@pytest.mark.parametrize("shape", [(2, 9, 8), (2, 3, 4, 2, 8)], ids=str)
def test_the_module_takes_sequences_and_volumes(shape):
    module = Gna(num_heads=2, head_dim=4, window=3)
    x = np.ones(shape, np.float32)
    assert jax.eval_shape(module.init_with_output, KEY, x)[0].shape == shape


def test_arguments_out_of_range():
    q, k, v = map(jnp.asarray, grid(6, 6))
    with pytest.raises(ValueError, match="stride=4 must be 1 to window=3"):
        gna(q, k, v, window=3, stride=4)
    with pytest.raises(ValueError, match="dilation=0 at least 1"):
        gna(q, k, v, dilation=0)
    with pytest.raises(ValueError, match=r"window=\(3,\) must have one value for each of 2 axes"):
        gna(q, k, v, window=(3,))
    with pytest.raises(ValueError, match="must be of the same grid"):
        inspect.unwrap(gna)(q, *grid(5, 6)[1:])  # users run without the annotations' checks
