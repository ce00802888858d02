"""Its kernel does what windows and neighborhoods ask of it; when it is chosen; what it refuses."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import registry
from attnjax.ops import neighborhood_attention as ops
from pallas_kernels import neighborhood as kernels
from pallas_kernels import placing
from tests import cotangents


def grid(*shape, N=2, K=2, H=4):
    return _random(*((2, *shape, heads, H) for heads in (N, K, K)))


def groups(G=3, T=4, S=5, N=2, K=2, H=4):
    return _random((2, G, T, N, H), (2, G, S, K, H), (2, G, S, K, H))


def _random(*shapes, seed=0):
    draw = np.random.default_rng(seed).standard_normal
    return [jnp.asarray(draw(shape), "float32") for shape in shapes]


def with_gradients(fn, args):
    o, vjp = jax.vjp(lambda args: fn(*args), args)
    return o, vjp(cotangents.like(o))


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("gna", (29,), dict(window=6, stride=2, dilation=2, causal=True)),
        ("gna", (6, 13), dict(window=(3, 5), stride=(3, 2), causal=(False, True))),
        ("gna", (4, 3, 6), dict(window=3, stride=(1, 2, 3), dilation=(1, 1, 2))),
        ("swin", (7, 9), dict(window=3, shift=1)),
    ],
    ids=str,
)
def test_windows_by_the_kernel_equal_their_oracles(name, shape, options, monkeypatch):
    by_kernel = functools.partial(ops.neighborhood_attention, implementation="interpret")
    monkeypatch.setattr(ops, "neighborhood_attention", by_kernel)
    record, args = registry.get(name), grid(*shape)
    if name == "swin":
        args += _random((1, 2, 9, 9), seed=1)
    fns = [functools.partial(fn, **options) for fn in (record.fn, record.oracle)]
    both = jax.jit(lambda args: [with_gradients(fn, args) for fn in fns])
    chex.assert_trees_all_close(*both(args), rtol=1e-4, atol=1e-5)


def test_the_kernel_is_the_default_on_tpu(monkeypatch):
    monkeypatch.setattr(placing, "whole", lambda: True)
    loss = lambda args: ops.neighborhood_attention(*args).sum()
    program = jax.jit(jax.value_and_grad(loss))
    export = lambda platform: jax.export.export(program, platforms=[platform])
    count = lambda platform, args: export(platform)(args).mlir_module().count("tpu_custom_call")
    assert count("tpu", groups()) == 2 and count("cpu", groups()) == 0
    assert count("tpu", groups(T=1, S=5000, H=128)) == 0  # doesn't fit


def test_xla_has_forward_mode_and_both_agree():
    args, [bias] = groups(N=4), _random((1, 4, 4, 5), seed=1)
    run = lambda name: (
        lambda *args: ops.neighborhood_attention(*args, bias=bias, implementation=name)
    )
    both = jax.jit(lambda *args: (jax.jvp(run("xla"), args, args), run("interpret")(*args)))
    (o, tangent), by_kernel = both(*args)
    assert np.any(tangent)
    chex.assert_trees_all_close(by_kernel, o, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_had_raises():
    run = inspect.unwrap(ops.neighborhood_attention)  # users run without the annotations' checks
    q, k, v = groups()
    with pytest.raises(ValueError, match="implementation='dense' must be one of"):
        run(q, k, v, implementation="dense")
    with pytest.raises(ValueError, match=r"shapes don't fit: q \(2, 3, 4, 2, 4\), k \(2, 3, 5"):
        run(q, k, v[:, :2])
    with pytest.raises(ValueError, match=r"bias of shape \(2, 4, 5\) must have shape \(1, 2, 4"):
        run(q, k, v, bias=jnp.zeros((2, 4, 5)))
    with pytest.raises(ValueError, match="must be of A=1 axes, G=3, T=4 and S=5"):
        run(q, k, v, near=kernels.Near(*(jnp.zeros((1, 3, 4), int) for _ in range(3))))
    large = jax.jit(functools.partial(run, implementation="pallas"))
    with pytest.raises(NotImplementedError, match="too large for the kernel"):
        large.trace(*groups(T=1, S=5000, H=128)).lower(lowering_platforms=("tpu",))
