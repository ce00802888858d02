"""The kernel for Hopper, interpreted, against a softmax over each sequence's own keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import decode_attention as kernels
from pallas_kernels.decode_attention import mosaic_gpu, part
from pallas_kernels.decode_attention.mosaic_gpu import steps

C, L = 8, 5


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Steps of two pages, so that there are several at tiny lengths."""
    monkeypatch.setattr(steps, "_MOST_KEYS", 2 * C)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def inputs(lengths, dtype="bfloat16", *, T=1, N=2, K=1, H=16, V=16):
    """Sequences in pages at random; whatever isn't a token of one is NaN, or no page at all."""
    lengths = np.asarray(lengths)
    B, P = len(lengths), len(lengths) * L
    table = np.random.default_rng(9).permutation(P).reshape(B, L)
    token = np.zeros((P, C), bool)
    token[table] = (np.arange(C * L)[None] < lengths[:, None]).reshape(B, L, C)
    pool = lambda x: jnp.asarray(np.where(token[:, None, :, None], x, np.nan), dtype)
    arrays = dict(q=jnp.asarray(normal(0, B, T, N, H), dtype), k=pool(normal(1, P, K, C, H)))
    arrays |= dict(v=pool(normal(2, P, K, C, V)) if V else None, lengths=lengths)
    return arrays | dict(table=np.where(token[table].any(2), table, 10**6))


def interpreted(q, k, v, table, lengths, *, splits, q_offset=None, **options):
    """As `kernels.decode_attention`, whose own choice can't interpret this kernel."""
    params = plgpu.InterpretGPUParams(detect_races=True)
    attend = functools.partial(mosaic_gpu.attend, interpret=params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.xla, "attend", attend)
        more = dict(splits=splits, q_offset=q_offset, implementation="xla")
        return kernels.decode_attention(q, k, v, table, lengths, **more, **options)


@functools.partial(jax.jit, static_argnames=("T", "G", "value_dim", "window", "softcap"))
def exact(q, k, v, table, lengths, starts, sinks, *, T, G, value_dim, window, softcap):
    """All of a sequence's keys at once; in the dtype of the inputs if they are narrow."""
    values = k[..., :value_dim] if v is None else v
    rows = lambda x: jnp.nan_to_num(
        x.at[table].get(mode="clip").swapaxes(2, 3).reshape(len(table), C * L, *x.shape[1::2])
    )
    k, v = (jnp.repeat(rows(x), G, 2) for x in (k, values))
    y = jnp.einsum("btnh,bsnh->bnts", q, k) * jnp.asarray(0.25, q.dtype)
    y = y if softcap is None else softcap * jnp.tanh(y / softcap)
    t = (starts[:, None] + np.arange(T)[None])[:, None, :, None]
    s = np.arange(C * L)[None, None, None]
    seen = (s <= t) & (s < lengths[:, None, None, None])
    seen = seen if window is None else seen & (s >= t - window)
    y = jnp.where(seen, y, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(y.dtype)[None, :, None, None], (*y.shape[:3], 1))
        y = jnp.concatenate([y, sink], -1)
    lse = jax.nn.logsumexp(y, -1)
    p = jnp.exp(y - jnp.where(lse == -jnp.inf, 0, lse)[..., None])[..., : C * L]
    return jnp.einsum("bnts,bsnv->btnv", p, v), lse.swapaxes(1, 2)


SINKS = jnp.asarray(normal(3, 4))
CASES = {  # lengths: none, one, odd, those of a page, a step and all pages
    "everything": (
        inputs([0, 1, 37], "float16", T=3, N=4, K=2, H=32),
        dict(window=9, softcap=2.0, sinks=SINKS),
        2,
    ),
    "latent, values in two parts": (
        inputs([8, 33], N=4, H=400, V=None),
        dict(value_dim=384, sinks=SINKS),
        2,
    ),
    "rows of two warpgroups, queries elsewhere": (
        inputs([16, 40], T=35, N=2),
        dict(q_offset=np.array([-2, 3])),
        1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_naive(case, capfd):
    """Neither on average nor anywhere, than what rounds to the inputs' dtype at each step."""
    arrays, options, splits = CASES[case]
    found = jax.jit(lambda a: interpreted(**a, **options, scale=0.25, splits=splits))(arrays)
    assert "race" not in capfd.readouterr().out.lower()
    T, N, K = *arrays["q"].shape[1:3], arrays["k"].shape[1]
    more = dict.fromkeys(("value_dim", "window", "softcap", "sinks")) | dict(T=T, G=N // K)
    more |= dict(starts=arrays["lengths"] - T) | options
    more["starts"] = more.pop("q_offset", more["starts"])
    wide = {
        name: None if x is None else x.astype(np.float32) if name in "qkv" else x
        for name, x in arrays.items()
    }
    naive, true = (
        [np.asarray(x, np.float32) for x in exact(**given, **more)] for given in (arrays, wide)
    )
    assert found[0].dtype == arrays["q"].dtype
    for x, bar, y in zip(found, naive, true, strict=True):
        finite = np.isfinite(y)
        np.testing.assert_array_equal(np.asarray(x)[~finite], y[~finite])
        errors = [abs(np.asarray(e, np.float32)[finite] - y[finite]) for e in (x, bar)]
        for size in (lambda e: np.sqrt((e**2).mean()), np.max):
            assert size(errors[0]) <= size(errors[1])


def test_steps_of_parts():
    """A sequence's steps, and of them those that all queries see whole."""

    def made(lengths, *, T=1, window=None, splits=1):
        options = part.Options(1.0, None, window, T, 1)
        sizes = dict(size=16, splits=splits)
        run = jax.jit(lambda x: steps.bounds(options, x, x - T, **sizes))
        return run(np.array(lengths)).tolist()

    assert made([0, 40, 32]) == [[[0, 0, 0, 0]], [[0, 0, 2, 3]], [[0, 0, 2, 2]]]
    # the first query of the second doesn't see the keys at 31 and 32
    assert made([40, 33], T=3) == [[[0, 0, 2, 3]], [[0, 0, 1, 3]]]
    assert made([100], window=40) == [[[3, 4, 6, 7]]]  # from 59 on
    three = [[0, 0, 3, 3], [3, 3, 6, 6], [6, 6, 6, 7]], [[0, 0, 1, 1], [1, 1, 1, 2], [2, 2, 2, 2]]
    assert made([100, 20], splits=3) == [*three]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (dict(dtype="float32"), r"multiplies bfloat16 or float16, not \['float32'\]"),
        (dict(C=20), "pages of 8, 16, 24..., not 20 keys"),
        (dict(H=24), "16, 32, 48... features, not 24 of keys and 16 of values"),
        (dict(V=40), "16, 32, 48... features, not 16 of keys and 40 of values"),
        (dict(V=320), "values of 256 features, 384 or 512, not 320"),
        (dict(H=1024, V=512), "keys of 1024 and values of 512 features don't fit"),
    ],
)
def test_what_hopper_cannot_take_is_refused_where_it_is_lowered(shapes, message):
    shapes = dict(dtype="bfloat16", C=16, H=16, V=16) | shapes
    x = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    dtype, page, H, V = shapes.values()
    q, k, v = (x(dtype, 2, *y) for y in ((1, 4, H), (2, page, H), (2, page, V)))
    run = functools.partial(kernels.decode_attention, scale=1.0, implementation="pallas")
    run = jax.jit(run).trace(q, k, v, x("int32", 2, 3), x("int32", 2))
    with pytest.raises(NotImplementedError, match=message):
        run.lower(lowering_platforms=("cuda",))
