"""Every kind of group against a softmax over whole matrices: outputs and gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnjax.core import sharding
from pallas_kernels import neighborhood as kernels
from pallas_kernels.neighborhood import layout, mosaic_tpu
from tests import cotangents


def inputs(B=2, G=5, T=9, S=9, N=2, K=2, H=8, V=8, *, biased=True, dtype=jnp.float32):
    draw = np.random.default_rng(0).standard_normal
    arrays = dict(q=draw((B, G, T, N, H)), k=draw((B, G, S, K, H)), v=draw((B, G, S, K, V)))
    if biased:
        arrays["bias"] = draw((N, T, S))
    return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}


def intervals(G, T, S, *, axes=2, shared=True):
    """Some that are empty: queries that see nothing."""
    draw = np.random.default_rng(0).integers
    low, length = draw(0, S, (axes, G, T)), draw(-1, 2 * S, (axes, G, T))
    at = draw(0, S, (axes, 1 if shared else G, S))
    return kernels.Near(*(jnp.asarray(x) for x in (at, low - S // 2, low + length)))


def oracle(q, k, v, bias=None, near=None, scale=0.25):
    k, v = (jnp.repeat(x, q.shape[3] // x.shape[3], 3) for x in (k, v))
    x = jnp.einsum("BGTNH,BGSNH->BGNTS", q, k) * scale
    x = x if bias is None else x + bias[None, None]
    seen = jnp.ones((1, 1, 1, *x.shape[-2:]), bool)
    if near is not None:
        pairs = (
            near.at[:, :, None] - near.low[..., None],
            near.high[..., None] - near.at[:, :, None],
        )
        seen = (jnp.minimum(*pairs) >= 0).all(0)[None, :, None]
    weights = jax.nn.softmax(jnp.where(seen, x, -1e30)) * seen
    return jnp.einsum("BGNTS,BGSNV->BGTNV", weights, v)


def with_gradients(fn, args):
    o, vjp = jax.vjp(lambda args: fn(**args), args)
    return o, *vjp(cotangents.like(o))


def run_both(args, near, **options):
    fn = functools.partial(kernels.neighborhood_attention, near=near, scale=0.25, **options)
    fns = fn, functools.partial(oracle, near=near)
    return jax.jit(lambda args: [with_gradients(fn, args) for fn in fns])(args)


@pytest.mark.parametrize(
    ("sizes", "near"),
    [
        (dict(G=2, T=70, S=5, N=4, biased=False), dict(axes=3)),  # a group in a pack
        (dict(G=1, T=1, S=1, N=3, K=1), None),
        (dict(G=2, T=3, S=7, N=4, H=64, V=128), dict()),  # heads in two parts
    ],
    ids=str,
)
def test_equals_the_softmax(sizes, near):
    args = inputs(**sizes)
    _, G, T, *_ = args["q"].shape
    near = None if near is None else intervals(G, T, args["k"].shape[2], **near)
    chex.assert_trees_all_close(*run_both(args, near, interpret=True), rtol=1e-5, atol=1e-5)


def test_several_steps_of_several_packs(monkeypatch):
    args = inputs(G=50)
    cut = lambda: layout.Cut.of(args["q"], args["k"], args["v"], biased=True)
    whole = cut().vmem
    monkeypatch.setattr(layout, "_STEP", 0)
    monkeypatch.setattr(layout, "_STEP", (whole + cut().vmem) // 2)
    assert cut().pack == 8 and cut().packs > 1 and cut().steps > 1
    near = intervals(50, 9, 9, shared=False)
    chex.assert_trees_all_close(*run_both(args, near, interpret=True), rtol=1e-5, atol=1e-5)


def test_two_cores_do_not_race():
    """With memory that is NaN until it is written, and the pipeline's copies simulated."""
    simulated = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)  # a race raises
    args, near = inputs(G=3, T=49, S=53, V=12), intervals(3, 49, 53, axes=1)
    arrays = args["q"], args["k"], args["v"]
    cut = layout.Cut.of(*arrays, biased=True)
    assert cut.pack == 2

    def run(args):
        arrays = args["q"], args["k"], args["v"], args["bias"]
        options = dict(scale=0.25, interpret=simulated)
        o = mosaic_tpu.forward(cut, arrays, near, **options)
        do = cotangents.like(o)
        grads = mosaic_tpu.backward(cut, arrays, near, do, **options)
        return o, dict(zip(("q", "k", "v", "bias"), grads, strict=True))

    slow = functools.partial(oracle, near=near)
    both = jax.jit(lambda args: (run(args), with_gradients(slow, args)))
    chex.assert_trees_all_close(*both(args), rtol=1e-5, atol=1e-5)


def test_bfloat16_errs_as_bfloat16_does():
    args = inputs(T=49, S=49, dtype=jnp.bfloat16)
    raised = jax.tree.map(lambda x: np.asarray(x, np.float32), args)
    kernel = functools.partial(kernels.neighborhood_attention, scale=0.25, interpret=True)

    @jax.jit
    def runs(args, raised):
        pairs = (kernel, args), (oracle, args), (oracle, raised)
        return [jax.tree.leaves(with_gradients(*pair)) for pair in pairs]

    rms = lambda x: np.sqrt(np.mean(np.asarray(x, np.float32) ** 2))
    for ours, plain, exact in zip(*jax.device_get(runs(args, raised)), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert rms(np.float32(ours) - exact) <= 1.5 * rms(np.float32(plain) - exact)


def test_sequences_over_devices_add_up_the_gradient_of_the_bias():
    mesh, P = sharding.make_mesh(data=2, devices=jax.devices()[:2]), jax.P
    args, near = inputs(), intervals(5, 9, 9)
    fn = lambda args: kernels.neighborhood_attention(**args, near=near, scale=0.25)
    lowered = jax.shard_map(
        lambda args: fn(args),
        mesh=mesh,
        in_specs=(dict.fromkeys("qkv", P("data")) | dict(bias=P()),),
        out_specs=P("data"),
    )
    loss = lambda args: lowered(args).sum()
    exported = jax.export.export(jax.jit(jax.value_and_grad(loss)), platforms=["tpu"])(args)
    assert exported.mlir_module().count("tpu_custom_call") == 2
    assert exported.mlir_module().count("all_reduce") == 1


def test_groups_that_are_too_large():
    args = jax.eval_shape(lambda: inputs(G=1, T=2000, S=3000, biased=False))
    with pytest.raises(NotImplementedError, match="groups of 2000 queries and 3000 keys are too"):
        jax.eval_shape(lambda args: kernels.neighborhood_attention(**args, scale=1.0), args)
