"""cuDNN's arguments by XLA in its place, what it is refused for, and where it is lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo  # there is no public way to feign a cuDNN

from attnjax.core import masks
from attnjax.ops import cudnn_attention, dense_attention, dropout, forward_mode
from attnjax.ops import dot_product_attention as ops
from pallas_kernels import placing, tables

PLAIN = dict.fromkeys(("mask", "bias", "softcap", "sinks", "dropout", "score_mod")) | {"scale": 0.3}
T, H = 12, 8


def arrays(**shapes):
    shapes = dict(q=(2, T, 4, H), k=(2, T, 2, H), v=(2, T, 2, H)) | shapes
    random = np.random.default_rng(0)
    return tuple(random.standard_normal(shape, np.float32) for shape in shapes.values())


def call(q, k, v, *, t=None, s=None, **options):
    t = np.arange(q.shape[1]) if t is None else t
    s = np.arange(k.shape[1]) if s is None else s
    return cudnn_attention.cudnn_attention(q, k, v, t, s, **PLAIN | options)


@pytest.fixture
def by_xla(monkeypatch):
    real = jax.nn.dot_product_attention

    def attend(*args, implementation, **options):
        assert implementation == "cudnn"
        return real(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)


@pytest.mark.parametrize("mask", [None, masks.Causal() & masks.Causal()])
def test_arguments_are_told_rightly(by_xla, mask):
    """Output, gradients, and tangents, which need an lse that cuDNN doesn't give."""
    t = np.arange(T)
    both = forward_mode.with_forward_mode(cudnn_attention.cudnn_attention)
    options = PLAIN | {"mask": mask}

    def derivatives(f, do, qkv):
        out, pull = jax.vjp(f, *qkv)
        return out, pull(do), jax.jvp(f, qkv, qkv)[1]

    @jax.jit
    def run(do, *qkv):
        attend = lambda way: lambda *x: way(*x, t, t, **options)[0]
        ways = both, dense_attention.dense_attention
        return [derivatives(attend(way), do, qkv) for way in ways]

    ours, expected = run(np.ones((2, T, 4, H), np.float32), *arrays())
    for x, y in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)


def key():
    return jax.random.key(0)


@pytest.mark.parametrize(
    "shapes, options, reason",
    [
        ({}, lambda: {"bias": np.ones((1, 1, T, T))}, "honour bias"),
        ({}, lambda: {"softcap": 1.0, "sinks": np.ones(4)}, "honour softcap, sinks"),
        ({}, lambda: {"dropout": dropout.Dropout(0.1, key())}, "honour dropout"),
        ({}, lambda: {"score_mod": lambda x, *at: x}, "honour score_mod"),
        ({}, lambda: {"mask": masks.Window(2)}, r"honour Window; it can Causal"),
        ({}, lambda: {"mask": masks.Causal() | masks.Prefix(2)}, "honour Or"),
        ({}, lambda: {"t": 1 + np.arange(T)}, "positions that don't count up from 0"),
        ({}, lambda: {"s": jnp.arange(T)}, "positions that don't count up from 0"),
        ({"q": (2, 3, 4, H)}, lambda: {"mask": masks.Causal()}, "not 12 and 3"),
        ({"v": (2, T, 2, 4)}, dict, "one width of heads"),
        ({}, dict, "can't be had"),  # of which there is none here
    ],
)
def test_what_is_not_honoured_is_refused(shapes, options, reason):
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(lambda *x: call(*x, **options()), *arrays(**shapes))


@pytest.fixture
def on_h100(monkeypatch):
    monkeypatch.setattr(placing, "whole", lambda: True)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    with tables.using(tables.of("NVIDIA H100 80GB HBM3")):
        yield


def targets(platform="cuda", width=64, dtype="bfloat16", way=lambda f: f, **options):
    """The calls of cuDNN in the program for a platform."""
    q, k = (jax.ShapeDtypeStruct((1, n, 2, width), dtype) for n in (64, 2048))
    f = lambda *x: jax.tree.leaves(ops.dot_product_attention(*x, **options))[0].sum()
    text = jax.jit(way(f)).trace(q, k, k).lower(lowering_platforms=(platform,)).as_text()
    return {name for name in ("fmhaSoftmax(", "fmhaSoftmaxBackward(") if name in text}


def test_an_h100_takes_it_for_plain_attention(on_h100):
    assert targets() == {"fmhaSoftmax("}
    assert targets(way=lambda f: jax.grad(f, (0, 1, 2))) == {"fmhaSoftmax(", "fmhaSoftmaxBackward("}


def test_it_is_not_taken_where_an_option_is_not_honoured(on_h100, monkeypatch):
    assert targets("cpu") == set()
    assert targets(return_lse=True) == set() == targets(softcap=2.0)
    assert targets(dtype="float32") == set() == targets(width=12)
    assert targets(implementation="blocked") == set()
    monkeypatch.setattr(placing, "whole", lambda: False)
    assert targets() == set()


def test_without_cudnn_it_is_as_before(on_h100, monkeypatch):
    def missing():
        raise RuntimeError("cuDNN not found.")

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", missing)
    assert targets() == set()
