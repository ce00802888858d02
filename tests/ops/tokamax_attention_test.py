"""tokamax's arguments by a form that any platform runs, and what it is refused for.

The package needn't be there: a form of its documented signature stands in for it. Where it is, its
own XLA form is held against the same, and its kernel for TPU, interpreted.
"""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnjax.core import masks
from attnjax.ops import dense_attention, dropout, forward_mode, tokamax_attention
from pallas_kernels import tables

PLAIN = dict.fromkeys(("mask", "bias", "softcap", "sinks", "dropout", "score_mod")) | {"scale": 0.3}
T, H = 128, 8


def as_documented(
    query, key, value, bias=None, mask=None, *, scale=None, is_causal=False, logits_soft_cap=None,
    precision=None, implementation=None,
):  # fmt: skip
    """What tokamax says of its dot_product_attention, without bias and mask."""
    assert bias is mask is None and implementation == "mosaic"
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    heads = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, heads, axis=2) for x in (key, value))
    x = scale * jnp.einsum("btnh,bsnh->bnts", query, key, precision=precision)
    x = x if logits_soft_cap is None else logits_soft_cap * jnp.tanh(x / logits_soft_cap)
    visible = jnp.tri(*x.shape[2:], dtype=bool) | (not is_causal)
    weights = jax.nn.softmax(jnp.where(visible[None, None], x, -jnp.inf))
    return jnp.einsum("bnts,bsnv->btnv", weights, value).astype(query.dtype)


@pytest.fixture
def library(monkeypatch):
    """The module that stands in for tokamax."""
    module = types.SimpleNamespace(dot_product_attention=as_documented)
    monkeypatch.setitem(sys.modules, "tokamax", module)
    return module


@pytest.fixture
def anywhere(monkeypatch):
    """As if the default device were one that tokamax has a kernel for."""
    monkeypatch.setattr(tokamax_attention, "_check_device", lambda platform: None)


def shapes(dtype="bfloat16", **others):
    found = dict(q=(2, T, 4, H), k=(2, T, 2, H), v=(2, T, 2, 6)) | others
    return tuple(jax.ShapeDtypeStruct(x, dtype) for x in found.values())


def arrays(**others):
    random = np.random.default_rng(0)
    return tuple(random.standard_normal(x.shape, "float32") for x in shapes(**others))


def call(q, k, v, *, t=None, s=None, platform="cuda", **options):
    t = np.arange(q.shape[1]) if t is None else t
    s = np.arange(k.shape[1]) if s is None else s
    kernel = functools.partial(tokamax_attention.tokamax_attention, platform=platform)
    return forward_mode.with_forward_mode(kernel)(q, k, v, t, s, **PLAIN | options)[0]


def dense(q, k, v, **options):
    t, s = np.arange(q.shape[1]), np.arange(k.shape[1])
    return dense_attention.dense_attention(q, k, v, t, s, **PLAIN | options)[0]


def derivatives(qkv, options):
    """[(tokamax's, those of the dense form)] of the output, its gradients and its tangents."""

    def of(attend, qkv):
        attend = functools.partial(attend, **options)
        out, pull = jax.vjp(attend, *qkv)
        do = jnp.cos(jnp.arange(float(out.size))).reshape(out.shape)
        return out, pull(do.astype(out.dtype)), jax.jvp(attend, qkv, qkv)[1]

    run = jax.jit(lambda *qkv: [of(attend, qkv) for attend in (call, dense)])
    return zip(*map(jax.tree.leaves, run(*qkv)), strict=True)


CASES = pytest.mark.parametrize(
    "options", [{"mask": masks.Causal() & masks.Causal()}, {"softcap": 2.0, "scale": H**-0.5}]
)


@CASES
def test_arguments_are_told_rightly(library, anywhere, monkeypatch, options):
    monkeypatch.setattr(tokamax_attention, "_DTYPES", ("float32",))
    for x, y in derivatives(arrays(), options):
        np.testing.assert_allclose(x, y, rtol=4e-6, atol=4e-6)


@CASES
def test_tokamax_itself_gives_the_same_numbers(anywhere, monkeypatch, options):
    real = pytest.importorskip("tokamax").dot_product_attention
    by_xla = lambda *x, implementation, **options: real(*x, implementation="xla", **options)
    monkeypatch.setattr("tokamax.dot_product_attention", by_xla)
    monkeypatch.setattr(tokamax_attention, "_DTYPES", ("float32",))
    for x, y in derivatives(arrays(), options):
        np.testing.assert_allclose(x, y, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("heads", [1, 2])
def test_its_kernel_for_tpu_gives_the_same_numbers(anywhere, monkeypatch, heads):
    tokamax = pytest.importorskip("tokamax")
    monkeypatch.setattr(tokamax_attention, "_DTYPES", ("float32",))
    qkv = arrays(q=(1, T, 4, H), k=(1, T, heads, H), v=(1, T, heads, 6))
    kernel = functools.partial(call, platform="tpu", mask=masks.Causal(), softcap=5.0)
    with tokamax.config.cross_compile(True), pltpu.force_tpu_interpret_mode():
        found = jax.vjp(kernel, *qkv)[1](qkv[0][..., :6])
    expected = jax.vjp(functools.partial(dense, mask=masks.Causal(), softcap=5.0), *qkv)[1]
    for x, y in zip(found, expected(qkv[0][..., :6]), strict=True):
        np.testing.assert_allclose(x, y, rtol=4e-6, atol=4e-6)


def test_the_usual_scale_is_left_to_it(library, anywhere, monkeypatch):
    """What it has tuned is looked up by the scale too, and its own is another float."""
    told = []
    spy = lambda *x, scale, **options: told.append(scale) or as_documented(*x, **options)
    monkeypatch.setattr(library, "dot_product_attention", spy)
    for scale in (128**-0.5, 0.5):
        wide = shapes(**dict.fromkeys("qkv", (1, T, 2, 128)))
        jax.eval_shape(functools.partial(call, scale=scale), *wide)
    assert told == [None, 0.5]


REFUSED = [
    ({}, lambda: {"bias": np.ones((1, 1, T, T))}, "honour bias"),
    ({}, lambda: {"sinks": np.ones(4), "score_mod": lambda x, *at: x}, "honour sinks, score_mod"),
    ({}, lambda: {"dropout": dropout.Dropout(0.1, jax.random.key(0))}, "honour dropout"),
    ({}, lambda: {"mask": masks.Window(2)}, "honour Window; it can Causal"),
    ({}, lambda: {"mask": masks.Causal() | masks.Prefix(2)}, "honour Or"),
    ({}, lambda: {"t": 1 + np.arange(T)}, "positions that don't count up from 0"),
    ({}, lambda: {"s": jnp.arange(T)}, "positions that don't count up from 0"),
    ({"q": (2, 2 * T, 4, H)}, lambda: {"mask": masks.Causal()}, "not 128 and 256"),
    ({"q": (2, 100, 4, H)}, dict, "multiples of 128, not 100 queries and 128 keys"),
    ({"dtype": "float32"}, dict, "for bfloat16, not for float32"),
    ({"v": (2, T, 2, 300)}, dict, "heads of 256, not of 300"),
    (dict.fromkeys("qkv", (1, 2**13, 5, 128)), lambda: {"platform": "tpu"}, "hold 1.25 GiB"),
]


@pytest.mark.parametrize("others, options, reason", REFUSED)
def test_what_is_not_honoured_is_refused(library, anywhere, others, options, reason):
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(lambda *x: call(*x, **options()), *shapes(**others))


def test_gradients_on_gpu_hold_no_more_than_they_must(library, anywhere):
    long = shapes(**dict.fromkeys("qkv", (1, 2**13, 5, 128)))
    assert jax.eval_shape(call, *long).shape == long[0].shape


def test_where_it_cannot_be_imported_it_is_refused(anywhere, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(NotImplementedError, match="can't be had: .*tokamax"):
        jax.eval_shape(call, *shapes())


def test_other_devices_are_refused(library, monkeypatch):
    def refused(platform, reason):
        with pytest.raises(NotImplementedError, match=reason):
            jax.eval_shape(functools.partial(call, platform=platform), *shapes())

    refused("tpu", "the default device, which is cpu, not tpu")
    a100 = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(tokamax_attention.backend, "get_default_device", lambda: a100)
    monkeypatch.setattr(tables, "device", lambda: a100)
    refused("cuda", "Hopper GPUs, not for NVIDIA A100")
    refused("tpu", "the default device, which is NVIDIA A100")


def test_a_checking_shard_map_is_refused(library, anywhere):
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("x",))
    for checks in (False, True):
        attend = jax.shard_map(
            call, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"), check_vma=checks
        )
        if checks:
            with pytest.raises(NotImplementedError, match="shard_map that checks"):
                jax.eval_shape(attend, *shapes())
        else:
            assert jax.eval_shape(attend, *shapes()).shape == (2, T, 4, 6)
