"""The kernels for Hopper, interpreted, against the recurrence: outputs, state and gradients."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import selective_scan as kernels
from pallas_kernels.selective_scan import mosaic_gpu
from pallas_kernels.selective_scan.mosaic_gpu import layout
from tests.pallas_kernels import selective_scan_test as plain


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """In the place of XLA's, as `kernels.selective_scan` itself can't interpret these kernels.

    For all of a test: the backward pass is traced after the forward one has returned.
    """
    params = plgpu.InterpretGPUParams(detect_races=True)
    forms = ("forward", "backward")
    forms = {x: functools.partial(getattr(mosaic_gpu, x), interpret=params) for x in forms}
    monkeypatch.setattr(kernels, "xla", types.SimpleNamespace(**forms))
    monkeypatch.setattr(kernels.placing, "whole", lambda: False)


def inputs(T, dtype="float32", *, B=1, N=1, H=4, M=5):
    draw, softplus = np.random.default_rng(0).standard_normal, lambda x: np.log1p(np.exp(x))
    args = dict(x=draw((B, T, N, H)), delta=softplus(draw((B, T, N, H)) - 1))
    args |= dict(b=draw((B, T, N, M)), c=draw((B, T, N, M)))
    args |= dict(rate=-np.exp(draw((N, H, M))), skip=draw((N, H)))
    args = {name: jnp.asarray(x, dtype) for name, x in args.items()}
    return args | dict(initial_state=jnp.asarray(draw((B, N, H, M)), "float32"))


def runs(fn, args, options):
    """(y, final state, gradients by cotangents of both) of the kernels and of the recurrence."""
    starts = options.get("segments", np.zeros(args["x"].shape[:2], int))

    @jax.jit
    def both(args):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), args)
        slow = functools.partial(plain.oracle, segments=starts)
        kernel = functools.partial(kernels.selective_scan, **options)
        return fn(kernel, args), fn(slow, wide)

    return both(args)


CASES = {
    "documents in a part of a step": (
        inputs(21, B=2, N=2),
        dict(chunk=16, segments=plain.packed(21)),
    ),
    "chunks of two steps, parts of channels and entries": (
        inputs(37, H=70, M=20),
        dict(chunk=32),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_recurrence(case, capfd):
    plain.assert_close(*runs(plain.with_gradients, *CASES[case]))
    assert "race" not in capfd.readouterr().out.lower()


def test_bfloat16_goes_in_and_out_with_a_float32_state():
    (y, state), (exact, exact_state) = runs(
        lambda fn, args: fn(**args), inputs(5, "bfloat16"), dict(chunk=64)
    )
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
    np.testing.assert_allclose(state, exact_state, rtol=1e-5, atol=1e-6)


def test_parts_of_entries():
    """As few as a forward or a backward part may have of them, filled up by few."""
    found = []
    for M in (1, 16, 17, 64, 72, 256):
        cut = layout.Cut.of(1, 1, M, whole=16)
        found.append((cut.M, cut.most(64).E, cut.most(16).E))
    expected = [(8, 8, 8), (16, 16, 16), (32, 32, 16), (64, 64, 16), (80, 40, 16), (256, 64, 16)]
    assert found == expected
