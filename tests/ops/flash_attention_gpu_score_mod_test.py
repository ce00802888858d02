"""score_mod in the kernels for Hopper, interpreted, against the dense form: outputs and gradients.

Gradients are those of q, k, v, bias and sinks, and of what a score_mod captured.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks, positions
from attnjax.ops import dot_product_attention as ops
from pallas_kernels import placing, tables
from tests.ops import flash_attention_gpu_test as tests

EPS = 2.0**-10  # of float16 and of TF32


def by_distance(slopes, cap, distance):
    """A bound, and slopes by distance for some queries of some heads, all learned."""

    def score_mod(x, b, n, t, s):
        x = cap[0] * jnp.tanh(x / cap[0])
        near = x - slopes[n] * jnp.log(distance(t, s) + 1.0)
        return jnp.where((t % 3 == 0) & (n > 0), x * (1 + 0.1 * n), near)

    return score_mod


def by_offset(slopes, cap):
    """Learned powers of distances, and waves for offsets that each example has its own of."""
    every = jnp.array([3, 5])

    def score_mod(x, b, n, t, s):
        far = abs(t - s) + 1.0
        wave = jnp.cos(cap[0] * (t - s)) + 0.1 * jnp.floor(x)
        return jnp.where((t - s) % every[b] != 0, x - 0.1 * far ** jax.nn.sigmoid(slopes[b]), wave)

    return score_mod


def run_each(arrays, **attends):
    """What each gives, with gradients by all arrays; by float32 what is called exact."""
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    arrays = {name: wide if name == "exact" else arrays for name in attends}
    return {name: tests.run(attend, arrays[name]) for name, attend in attends.items()}


def attending(attend, score_mod, **options):
    return lambda slopes, cap, **arrays: attend(
        **arrays, score_mod=score_mod(slopes, cap), **options
    )


def compare(dtype, score_mod, other, options, times=1, **sizes):
    """The kernel by score_mod against others by the other, which is the same where a query sees."""
    arrays = tests.inputs(dtype, **sizes)
    arrays |= {"slopes": jnp.asarray(tests.normal(8, 2)), "cap": jnp.asarray([0.7])}
    attends = dict(found=tests.kernel, bar=tests.naive, exact=tests.dense)
    mods = dict(found=score_mod, bar=other, exact=other)
    attends = {name: attending(x, mods[name], **options) for name, x in attends.items()}
    results = jax.device_get(jax.jit(lambda arrays: run_each(arrays, **attends))(arrays))
    for name in ("slopes", "cap"):
        found, exact = (results[which].pop(name) for which in ("found", "exact"))
        # a query's delta is of an output that is rounded: an error that all of its scores share
        np.testing.assert_allclose(found, exact, rtol=0, atol=EPS * abs(exact).max(), err_msg=name)
    tests.assert_no_worse_than_naive(**results, times=times)


def test_a_bound_and_slopes_with_no_value_where_nothing_is_seen():
    """The kernel's score_mod is NaN, and has no slope, where the mask doesn't let a query see."""
    unsafe = functools.partial(by_distance, distance=lambda t, s: t - s)
    safe = functools.partial(by_distance, distance=lambda t, s: jnp.maximum(t - s, 0))
    options = dict(mask=masks.Causal() & masks.Window(40, 0), softcap=2.0)
    sizes = dict(T=61, S=70, V=40, bias=(1, 2, 61, 70), sinks=True)
    compare("float16", unsafe, safe, options, **sizes)


def test_float32_powers_and_waves():
    sizes = dict(B=2, T=30, S=140, N=1, bias=(2, 1, 1, 140))
    options = dict(mask=masks.Window(50, 90))
    compare("float32", by_offset, by_offset, options, times=1.5, **sizes)


@pytest.mark.parametrize(
    ("score_mod", "taken"),
    [
        (positions.alibi(2), True),
        (lambda x, b, n, t, s: jnp.fmod(x, 3.0), False),
        (lambda x, b, n, t, s: x + jnp.ones(256)[abs(t - s)], False),
    ],
)
def test_where_a_table_names_the_kernel_the_others_are_for_xla(monkeypatch, score_mod, taken):
    monkeypatch.setattr(placing, "whole", lambda: True)
    row = dict(operation="dot_product_attention", implementation="pallas")
    table = tables.Table("x", "cuda", (tables.Row(**row, source={"how": "computed", "rule": "r"}),))
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), "bfloat16")
    attend = lambda q: ops.dot_product_attention(q, q, q, score_mod=score_mod)
    with tables.using(table):
        lowered = jax.jit(attend).trace(q).lower(lowering_platforms=("cuda",))
    assert ("mosaic_gpu" in lowered.as_text()) == taken
