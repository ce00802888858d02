"""The kernels for Hopper, interpreted, against the dense form: outputs, gradients and masks."""

import contextlib
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


def inputs(dtype="bfloat16", *, B=1, T=128, S=128, N=2, K=1, H=64, V=64, sinks=False, bias=()):
    arrays = {"q": normal(0, B, T, N, H), "k": normal(1, B, S, K, H), "v": normal(2, B, S, K, V)}
    arrays |= {"bias": normal(3, *bias)} if bias else {}
    arrays = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
    return arrays | ({"sinks": jnp.asarray(normal(4, N))} if sinks else {})


def kernel(q, k, v, *, params=plgpu.InterpretGPUParams(), positions=None, **options):  # noqa: B008
    t, s = positions or (np.arange(q.shape[1]), np.arange(k.shape[1]))
    others = dict.fromkeys(("mask", "bias", "softcap", "sinks", "dropout", "score_mod"))
    options = others | dict(scale=q.shape[-1] ** -0.5, interpret=params) | options
    with jax.default_matmul_precision("default"):
        return gpu.flash_attention_gpu(q, k, v, t, s, **options)


dense = functools.partial(ops.dot_product_attention, implementation="dense", return_lse=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(rule, x, y):
    """An einsum; of float32 in TF32, as its gradients are."""
    factors = x, y
    if x.dtype == "float32":
        factors = (jax.lax.reduce_precision(x, 8, 10) for x in factors)
    return jnp.einsum(rule, *factors)


def _gradients(rule, factors, do):
    (x, y), (inputs, out) = factors, rule.split("->")
    of_x, of_y = inputs.split(",")
    return product(f"{out},{of_y}->{of_x}", do, y), product(f"{out},{of_x}->{of_y}", do, x)


product.defvjp(lambda rule, *factors: (product(rule, *factors), factors), _gradients)


def naive(q, k, v, *, mask=None, softcap=None, bias=None, sinks=None, dropout=None, score_mod=None):
    """Everything in the dtype of the inputs, but for the largest and the last steps."""
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    k, v = (jnp.repeat(x, N // K, 2) for x in (k, v))
    x = product("btnh,bsnh->bnts", q, k) * q.dtype.type(q.shape[-1] ** -0.5)
    x = x if softcap is None else softcap * jnp.tanh(x / softcap)
    x = x if bias is None else x + bias
    if score_mod is not None:
        x = score_mod(x, *jnp.ix_(*map(jnp.arange, x.shape))).astype(x.dtype)
    seen = True if mask is None else mask.visible(np.arange(T), np.arange(S))
    x = jnp.where(seen, x, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(x.dtype)[None, :, None, None], (*x.shape[:3], 1))
        x = jnp.concatenate([x, sink], -1)
    lse = jax.nn.logsumexp(x, -1)
    p = jnp.exp(x - jnp.where(lse == -jnp.inf, 0, lse)[..., None])[..., :S]
    if dropout is not None:
        kept = dropout.keep(*jnp.ix_(*map(jnp.arange, (B, N, T, S))))
        p = jnp.where(kept, p / (1 - dropout.rate), 0).astype(p.dtype)
    return product("bnts,bsnv->btnv", p, v), lse.swapaxes(1, 2)


def run(attend, arrays, **options):
    """(o, lse, gradients of every array), by random cotangents of all that is finite; float32."""

    def loss(arrays):
        o, lse = (x.astype(jnp.float32) for x in attend(**arrays, **options))
        finite = jnp.where(lse > -jnp.inf, lse, 0.0)
        return (o * normal(5, *o.shape)).sum() + (finite * normal(6, *lse.shape)).sum(), (o, lse)

    (_, (o, lse)), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
    return {"o": o, "lse": lse} | {name: x.astype(jnp.float32) for name, x in grads.items()}


def assert_no_worse_than_naive(found, bar, exact, times=1):
    """Neither on average nor anywhere, than what rounds to the inputs' dtype at each step."""
    own = 4 * np.finfo(np.float32).eps  # what is called exact is of float32
    for name, x in exact.items():
        finite = np.isfinite(x)
        np.testing.assert_array_equal(found[name][~finite], x[~finite])
        errors = [abs(y[name][finite] - x[finite]) for y in (found, bar)]
        for size in (lambda e: np.sqrt((e**2).mean()), np.max):
            bound = times * size(errors[1]) + own * abs(x[finite]).max()
            assert size(errors[0]) <= bound, name


def run_each(arrays, **options):
    """What the kernel gives, what is naive and what is exact."""
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    found = [run(attend, arrays, **options) for attend in (kernel, naive)]
    return *found, run(dense, wide, **options)


def documents(*lengths):
    return jnp.asarray(np.stack([np.repeat(np.arange(len(x)), x) for x in lengths]))


SEGMENTS = masks.Segments(documents([60, 40, 1], [1, 70, 30]), documents([90, 10, 33], [3, 65, 65]))
GRID = masks.Neighborhood((6, 10), (3, 3), stride=(2, 1), dilation=(1, 2))
SOME = normal(7, 1, 2, 100, 70) > 1
SOME[0, 0, 3:9] = SOME[0, 1, 90:] = False  # queries that see nothing
DROP = dropout.Dropout(0.3, jax.random.key(1))
CASES = {
    "documents, lengths that differ": (
        inputs("float16", B=2, T=101, S=133, N=1, H=96, V=40, bias=(1, 1, 101, 133)),
        dict(mask=SEGMENTS | masks.Window(12, 3), softcap=2.0),
    ),
    "heads wider than values and than a step, a grid": (
        inputs(T=60, S=60, N=1, H=256, V=192),
        dict(mask=GRID),
    ),
    "a mask for each head": (
        inputs(T=100, S=70, bias=(1, 2, 1, 70)),
        dict(mask=masks.Dense(jnp.asarray(SOME)), dropout=DROP),
    ),
    "float32": (
        inputs("float32", T=30, S=70, sinks=True, bias=(1, 1, 30, 70)),
        dict(mask=masks.Causal() | masks.Window(5, None)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_naive(case):
    arrays, options = CASES[case]
    found, *others = jax.device_get(jax.jit(lambda arrays: run_each(arrays, **options))(arrays))
    # naive float32 rounds factors alone; the kernel has delta from an output, which is rounded too
    assert_no_worse_than_naive(found, *others, times=1.5 if case == "float32" else 1)
    if case == "a mask for each head":
        assert (found["o"][0, 3:9, 0] == 0).all() and (found["lse"][0, 3:9, 0] == -np.inf).all()
        assert (found["q"][0, 3:9, 0] == 0).all() and (found["q"][0, 90:, 1] == 0).all()


def test_dropout_is_that_of_the_dense_form_bit_for_bit():
    """Weights and their gradients are to be seen where values and cotangents are unit vectors."""
    T, S, V = 96, 128, 64
    arrays, do = inputs("float16", T=T, S=S), np.zeros((1, T, 2, V))
    v, do[0, :V, 1] = np.eye(S)[None, :, None, -V:], np.eye(V)
    v, do = (jnp.asarray(x, "float16") for x in (v, do))
    at = np.arange(T) + 1000, np.arange(S)[::-1] * 3

    @jax.jit
    def runs(arrays, v, do):
        def kept(attend):
            attend = functools.partial(attend, positions=at, dropout=DROP)
            (o, lse), vjp = jax.vjp(lambda v: attend(arrays["q"], arrays["k"], v), v)
            return o != 0, vjp((do, jnp.zeros_like(lse)))[0] != 0

        return kept(kernel), kept(dense)

    (o, dv), expected = runs(arrays, v, do)
    jax.tree.map(np.testing.assert_array_equal, (o, dv), expected)
    np.testing.assert_array_equal(o[0, :V, 1], dv[0, -V:, 0].T)
    assert 0.65 < o.mean() < 0.75


def test_one_key_that_scores_high():
    arrays = inputs(T=70, S=1)
    arrays["q"] *= 100
    wide = jax.tree.map(lambda x: np.asarray(x, np.float32), arrays)
    both = jax.jit(lambda arrays, wide: (kernel(**arrays), dense(**wide)))
    (o, lse), (_, expected) = jax.device_get(both(arrays, wide))
    np.testing.assert_array_equal(o, np.broadcast_to(arrays["v"], o.shape))
    np.testing.assert_allclose(lse, expected, rtol=1e-6, atol=1e-5)


def test_a_traced_selection_skips_the_other_keys_without_races(capfd):
    """Keys that are NaN poison whatever reads them, even under a weight of zero.

    What all of them are skipped for is no worse than naive: causal, with tiles of every kind.
    """
    T, params = 200, plgpu.InterpretGPUParams(detect_races=True)
    arrays, late = inputs(T=T, S=T, N=1, bias=(1, 1, T, 1)), np.arange(T)[:, None, None] >= 128
    poison = lambda x: jnp.asarray(np.where(late, np.nan, x), "bfloat16")
    fewer = arrays | {name: arrays[name][:, :128] for name in "kv"}
    poisoned = arrays | {name: poison(arrays[name]) for name in "kv"}

    @jax.jit
    def runs(poisoned, fewer, selected, at):
        mask = masks.Blocks(selected, 128, 128) & masks.Causal()
        options = dict(mask=mask, positions=(at, at))
        found = run(functools.partial(kernel, params=params), poisoned, **options)
        return found, run_each(fewer, mask=masks.Causal())

    selected = np.tile(np.arange(2) == 0, (1, 1, 2, 1))
    found, (expected, *others) = jax.device_get(runs(poisoned, fewer, selected, np.arange(T)))
    assert_no_worse_than_naive(expected, *others)
    for name in ("o", "lse", "q", "bias"):
        np.testing.assert_array_equal(found[name], expected[name])
    for name in "kv":
        np.testing.assert_array_equal(found[name][:, :128], expected[name])
        assert (found[name][:, 128:] == 0).all()
    assert "race" not in capfd.readouterr().out.lower()


@pytest.mark.parametrize(
    ("dtype", "options", "named"),
    [
        ("float8_e4m3fn", {}, "bfloat16, float16 or float32, not"),
        ("bfloat16", dict(score_mod=lambda x, b, n, t, s: x % 3.0), "with rem of float32"),
    ],
)
def test_what_it_refuses_names_what_would(dtype, options, named):
    with pytest.raises(NotImplementedError, match=f"{named}.*implementation='blocked' can"):
        jax.eval_shape(lambda x: kernel(**x, **options), inputs(dtype))


@pytest.mark.parametrize("wanted", ["o", "q", "v"])
def test_it_refuses_where_it_is_lowered_for_a_gpu_and_only_there(wanted):
    """Gradients alone too, of which the output may fall away."""

    def fn(arrays):
        options = dict(implementation="pallas")
        attend = lambda arrays: ops.dot_product_attention(**arrays, **options).sum()
        return attend(arrays) if wanted == "o" else jax.grad(attend)(arrays)[wanted]

    traced = jax.jit(fn).trace(inputs("float32"))  # with the precision of tests
    refused = "float32 as TF32, not with precision='highest'; implementation='blocked'"
    with pytest.raises(NotImplementedError, match=refused):
        traced.lower(lowering_platforms=("cuda",))
    with pytest.raises(NotImplementedError, match="implementation='interpret' runs"):
        traced.lower(lowering_platforms=("cpu",))
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    ("kind", "hopper"),
    [("NVIDIA H100 80GB HBM3", True), ("NVIDIA GH200 480GB", True)]
    + [("NVIDIA A100-SXM4-80GB", False), ("NVIDIA B200", False), ("NVIDIA H1", False)],
)
def test_it_refuses_gpus_of_another_kind(kind, hopper):
    device = jax.sharding.AbstractDevice(kind, 100, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    found = contextlib.nullcontext()
    if not hopper:
        named = f"Hopper GPUs, not for {kind}; implementation='blocked'"
        found = pytest.raises(NotImplementedError, match=named)
    shapes = jax.eval_shape(inputs)
    with jax.sharding.use_abstract_mesh(mesh), found:
        jax.eval_shape(lambda x: kernel(**x, params=False), shapes)


def test_what_neither_kernel_can_is_refused_at_once():
    table = jnp.zeros(128)
    options = dict(score_mod=lambda x, b, n, t, s: x + table[t], implementation="pallas")
    fn = lambda x: ops.dot_product_attention(**x, **options)
    with pytest.raises(NotImplementedError, match="tpu: .* score_mod.*; cuda: .* score_mod"):
        jax.eval_shape(fn, inputs())


def test_a_gpu_has_xla_unless_the_kernel_is_asked_for(monkeypatch):
    monkeypatch.setattr(placing, "whole", lambda: True)
    fn = lambda x: ops.dot_product_attention(**x)
    lowered = jax.jit(fn).trace(inputs(T=512, S=512)).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" not in lowered.as_text()


def test_gradients_of_a_part_of_the_keys():
    """Those of keys are as they are beside the others; those of queries add up."""
    arrays = inputs(T=100, S=256)
    options = dict(mask=masks.Window(left=150), positions=(np.arange(100, 200), np.arange(256)))
    whole, pull = jax.vjp(lambda x: kernel(**x, **options), arrays)
    cotangents = jax.tree.map(lambda x: jnp.asarray(normal(5, *x.shape), x.dtype), whole)
    [expected] = pull(cotangents)
    dq = jnp.zeros(arrays["q"].shape)
    for keys in np.split(np.arange(256), 2):
        part = arrays | {name: arrays[name][:, keys] for name in "kv"}
        here = options | dict(positions=(np.arange(100, 200), keys), whole=whole)
        out, pull = jax.vjp(lambda x, here=here: kernel(**x, **here), part)
        [found] = pull(cotangents)
        np.testing.assert_array_equal(out[0], whole[0])
        for name in "kv":
            np.testing.assert_array_equal(found[name], expected[name][:, keys])
        dq += found["q"]
    scale = abs(expected["q"]).max()
    np.testing.assert_allclose(dq, expected["q"].astype("float32"), atol=2**-7 * scale, rtol=0)
