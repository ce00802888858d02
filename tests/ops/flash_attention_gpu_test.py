"""The kernels for Hopper, interpreted, against the dense form: outputs, gradients and masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import dropout
from attnjax.ops import flash_attention_gpu as gpu
from pallas_kernels import placing


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def inputs(dtype="bfloat16", *, B=1, T=128, S=128, N=2, K=1, H=64, V=64, sinks=False):
    arrays = {"q": normal(0, B, T, N, H), "k": normal(1, B, S, K, H), "v": normal(2, B, S, K, V)}
    arrays = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
    return arrays | ({"sinks": jnp.asarray(normal(4, N))} if sinks else {})


def kernel(q, k, v, *, params=plgpu.InterpretGPUParams(), positions=None, **options):  # noqa: B008
    t, s = positions or (np.arange(q.shape[1]), np.arange(k.shape[1]))
    others = dict.fromkeys(("mask", "bias", "softcap", "sinks", "dropout", "score_mod"))
    options = others | dict(scale=q.shape[-1] ** -0.5, interpret=params) | options
    return gpu.flash_attention_gpu(q, k, v, t, s, **options)


dense = functools.partial(ops.dot_product_attention, implementation="dense", return_lse=True)


def naive(q, k, v, *, mask=None, softcap=None, sinks=None):
    """Everything in the dtype of the inputs, but for the largest and the last steps."""
    (T, N), (S, K) = q.shape[1:3], k.shape[1:3]
    k, v = (jnp.repeat(x, N // K, 2) for x in (k, v))
    x = jnp.einsum("btnh,bsnh->bnts", q, k) * q.dtype.type(q.shape[-1] ** -0.5)
    x = x if softcap is None else softcap * jnp.tanh(x / softcap)
    seen = True if mask is None else mask.visible(np.arange(T), np.arange(S))
    x = jnp.where(seen, x, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(x.dtype)[None, :, None, None], (*x.shape[:3], 1))
        x = jnp.concatenate([x, sink], -1)
    lse = jax.nn.logsumexp(x, -1)
    p = jnp.exp(x - jnp.where(lse == -jnp.inf, 0, lse)[..., None])[..., :S]
    return jnp.einsum("bnts,bsnv->btnv", p, v), lse.swapaxes(1, 2)


def run(attend, arrays, **options):
    """(o, lse, gradients of every array), by random cotangents of all that is finite; float32."""

    def loss(arrays):
        o, lse = (x.astype(jnp.float32) for x in attend(**arrays, **options))
        finite = jnp.where(lse > -jnp.inf, lse, 0.0)
        return (o * normal(5, *o.shape)).sum() + (finite * normal(6, *lse.shape)).sum(), (o, lse)

    (_, (o, lse)), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
    return {"o": o, "lse": lse} | {name: x.astype(jnp.float32) for name, x in grads.items()}


def assert_no_worse_than_naive(arrays, **options):
    """Neither on average nor anywhere, than what rounds to the inputs' dtype at each step."""

    @jax.jit
    def runs(arrays):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
        found = (run(attend, arrays, **options) for attend in (kernel, naive))
        return *found, run(dense, wide, **options)

    found, bar, exact = jax.tree.map(np.asarray, runs(arrays))
    for name, x in exact.items():
        finite = np.isfinite(x)
        np.testing.assert_array_equal(found[name][~finite], x[~finite])
        errors = [abs(y[name][finite] - x[finite]) for y in (found, bar)]
        for size in (lambda e: np.sqrt((e**2).mean()), np.max):
            assert size(errors[0]) <= size(errors[1]), name
    return found


def documents(*lengths):
    return jnp.asarray(np.stack([np.repeat(np.arange(len(x)), x) for x in lengths]))


SEGMENTS = masks.Segments(documents([60, 40, 1], [1, 70, 30]), documents([90, 10, 33], [3, 65, 65]))
GRID = masks.Neighborhood((6, 10), (3, 3), stride=(2, 1), dilation=(1, 2))
SOME = normal(7, 1, 2, 100, 70) > 1
SOME[0, 0, 3:9] = SOME[0, 1, 90:] = False  # queries that see nothing
CASES = {
    "causal, of several tiles": (inputs(T=200, S=200, N=1), dict(mask=masks.Causal())),
    "every option, lengths that differ": (
        inputs("float16", B=2, T=101, S=133, H=96, V=40, sinks=True),
        dict(mask=SEGMENTS | masks.Window(12, 3), softcap=2.0),
    ),
    "heads wider than values and than a step, a grid": (
        inputs(T=60, S=60, N=1, H=256, V=192),
        dict(mask=GRID),
    ),
    "a mask for each head": (
        inputs(T=100, S=70),
        dict(mask=masks.Dense(jnp.asarray(SOME))),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_naive(case):
    arrays, options = CASES[case]
    found = assert_no_worse_than_naive(arrays, **options)
    if case == "a mask for each head":
        assert (found["o"][0, 3:9, 0] == 0).all() and (found["lse"][0, 3:9, 0] == -np.inf).all()
        assert (found["q"][0, 3:9, 0] == 0).all() and (found["q"][0, 90:, 1] == 0).all()


def test_one_key_that_scores_high():
    arrays = inputs(T=70, S=1)
    arrays["q"] *= 100
    o, lse = jax.jit(kernel)(**arrays)
    np.testing.assert_array_equal(o, jnp.broadcast_to(arrays["v"], o.shape))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    np.testing.assert_allclose(lse, dense(**wide)[1], rtol=1e-6, atol=1e-5)


def test_a_traced_selection_skips_the_other_keys_without_races(capfd):
    """Keys that are NaN poison whatever reads them, even under a weight of zero."""
    T, params = 256, plgpu.InterpretGPUParams(detect_races=True)
    arrays = inputs(T=T, S=T, N=1)
    poisoned = arrays | {name: arrays[name].at[:, 128:].set(np.nan) for name in "kv"}

    @jax.jit
    def runs(selected, at):
        mask = masks.Blocks(selected, 128, 128) & masks.Causal()
        options = dict(mask=mask, positions=(at, at))
        fewer = {"q": arrays["q"], "k": arrays["k"][:, :128], "v": arrays["v"][:, :128]}
        found = run(functools.partial(kernel, params=params), poisoned, **options)
        return found, run(kernel, fewer, mask=masks.Causal())

    found, expected = runs(jnp.tile(jnp.arange(2) == 0, (1, 1, 2, 1)), jnp.arange(T))
    for name in ("o", "lse", "q"):
        np.testing.assert_array_equal(found[name], expected[name])
    for name in "kv":
        np.testing.assert_array_equal(found[name][:, :128], expected[name])
        assert (found[name][:, 128:] == 0).all()
    assert "race" not in capfd.readouterr().out.lower()


@pytest.mark.parametrize(
    ("dtype", "options", "named"),
    [
        ("float32", {}, "bfloat16 or float16, not"),
        ("bfloat16", dict(bias=jnp.zeros((1, 1, 1, 1))), "can't honour bias"),
        ("bfloat16", dict(dropout=dropout.Dropout(0.1, jax.random.key(0))), "can't honour dropout"),
        ("bfloat16", dict(score_mod=lambda x, b, n, t, s: x), "can't honour score_mod"),
    ],
)
def test_what_it_refuses_names_what_would(dtype, options, named):
    with pytest.raises(NotImplementedError, match=f"{named}.*implementation='blocked' can"):
        jax.eval_shape(lambda x: kernel(**x, **options), inputs(dtype))


@pytest.mark.parametrize("wanted", ["o", "q", "v"])
def test_it_refuses_where_it_is_lowered_for_a_gpu_and_only_there(wanted):
    """Gradients alone too, of which the output may fall away."""

    def fn(arrays):
        options = dict(bias=jnp.ones((1, 1, 1, 1)), implementation="pallas")
        attend = lambda arrays: ops.dot_product_attention(**arrays, **options).sum()
        return attend(arrays) if wanted == "o" else jax.grad(attend)(arrays)[wanted]

    traced = jax.jit(fn).trace(inputs())
    with pytest.raises(NotImplementedError, match="can't honour bias; implementation='blocked'"):
        traced.lower(lowering_platforms=("cuda",))
    with pytest.raises(NotImplementedError, match="implementation='interpret' runs"):
        traced.lower(lowering_platforms=("cpu",))
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_what_neither_kernel_can_is_refused_at_once():
    options = dict(score_mod=lambda x, b, n, t, s: x, implementation="pallas")
    fn = lambda x: ops.dot_product_attention(**x, **options)
    with pytest.raises(NotImplementedError, match="tpu: .* score_mod.*; cuda: .* score_mod"):
        jax.eval_shape(fn, inputs())


def test_a_gpu_has_xla_unless_the_kernel_is_asked_for(monkeypatch):
    monkeypatch.setattr(placing, "whole", lambda: True)
    fn = lambda x: ops.dot_product_attention(**x)
    lowered = jax.jit(fn).trace(inputs(T=512, S=512)).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" not in lowered.as_text()
