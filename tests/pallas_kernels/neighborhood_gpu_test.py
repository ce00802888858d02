"""Every kind of group on Hopper against a softmax over whole matrices; packs, tiles, refusals."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnjax.core import registry
from attnjax.ops import neighborhood_attention as ops
from pallas_kernels import flash_attention
from pallas_kernels import neighborhood as kernels
from pallas_kernels.neighborhood import mosaic_gpu
from tests.pallas_kernels import gpu_forms

DRAW = np.random.default_rng(0)


def normal(*shape, dtype="float32"):
    return jnp.asarray(DRAW.standard_normal(shape, np.float32), dtype)


def intervals(G, T, S, *, axes=2):
    """Some that are empty: queries that see nothing."""
    low = DRAW.integers(-S // 2, S // 2, (axes, G, T))
    length = DRAW.integers(-1, S, (axes, G, T)) * (np.arange(T) % 7 > 0)
    at = DRAW.integers(0, S, (axes, G, S))
    return kernels.Near(*map(jnp.asarray, (at, low, low + length - 1)))


def dense(q, k, v, bias, *, near, scale):
    """In the dtype of the inputs."""
    k, v = (jnp.repeat(x, q.shape[3] // x.shape[3], 3) for x in (k, v))
    x = jnp.einsum("bgtnh,bgsnh->bgnts", q, k) * q.dtype.type(scale) + bias[None, None]
    x = jnp.where(ops.seen(near)[None, :, None], x, -jnp.inf)
    lse = jax.nn.logsumexp(x, -1, keepdims=True)
    p = jnp.exp(x - jnp.where(lse == -jnp.inf, 0, lse))
    return jnp.einsum("bgnts,bgsnv->bgtnv", p, v)


def test_packs_are_no_worse_than_naive():
    """Two groups side by side, two query heads of a key head, a bias; some see nothing."""
    B, G, T, S, N, K, H, V = 1, 2, 50, 53, 2, 1, 32, 40
    shapes = dict(q=(B, G, T, N, H), k=(B, G, S, K, H), v=(B, G, S, K, V), bias=(N, T, S))
    arrays = {name: normal(*shape, dtype="bfloat16") for name, shape in shapes.items()}
    options = dict(near=intervals(G, T, S), scale=H**-0.5)
    simulated = plgpu.InterpretGPUParams()
    kernel = functools.partial(mosaic_gpu.neighborhood_attention, interpret=simulated, **options)
    naive = functools.partial(dense, **options)
    found = gpu_forms.assert_no_worse_than_naive(kernel, naive, arrays, gradients=())
    unseen = ~np.asarray(ops.seen(options["near"])).any(-1)
    assert unseen.any() and (found["o"][0, unseen] == 0).all()


@pytest.fixture
def states(monkeypatch):
    """Those that softmax attention is called with, which is computed over whole matrices."""
    met = []

    def attend(q, k, v, t, s, mask, **options):
        jax.debug.callback(lambda x: met.append(np.asarray(x)), jnp.asarray(mask.states))
        return gpu_forms.by_states(q, k, v, t, s, mask, **options)

    monkeypatch.setattr(mosaic_gpu.mosaic_gpu, "flash_attention", attend)
    by_gpu = functools.partial(ops._by_kernel, attend=mosaic_gpu.neighborhood_attention)

    def choose(q, k, v, *, near=None, bias=None, implementation):
        return by_gpu(q, k, v, near, bias, scale=q.shape[-1] ** -0.5)

    monkeypatch.setattr(ops, "neighborhood_attention", choose)
    return met


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("gna", (300,), dict(window=132, stride=4, dilation=2, causal=True)),
        ("gna", (16, 13), dict(window=(13, 12), stride=(3, 2), causal=(False, True))),
        ("gna", (4, 3, 6), dict(window=3, stride=(1, 2, 3), dilation=(1, 1, 2))),
        ("swin", (7, 9), dict(window=3, shift=1)),
    ],
    ids=str,
)
def test_windows_equal_their_oracles(name, shape, options, states):
    record = registry.get(name)
    args = [normal(1, *shape, 2, 4) for _ in "qkv"]
    if name == "swin":
        args.append(normal(1, 2, options["window"] ** 2, options["window"] ** 2))

    def run(fn):
        o, pull = jax.vjp(lambda *args: fn(*args, **options), *args)
        return o, pull(jnp.cos(o))

    both = jax.jit(lambda: [run(fn) for fn in (record.fn, record.oracle)])
    chex.assert_trees_all_close(*both(), rtol=1e-4, atol=1e-5)
    jax.effects_barrier()
    if shape == (300,):  # a tile that lies after all queries of another
        assert (states[0] == flash_attention.EMPTY).mean() > 0.1


def test_packs_waste_as_few_keys_as_can_be():
    pack = lambda T, S, G=99: mosaic_gpu.Cut.of(1, G, T, S).pack
    assert pack(49, 169) == 2 and pack(49, 49) == 2 and pack(64, 64) == 2
    assert pack(9, 25) == 10  # 250 keys of 256
    assert pack(1, 1) == 99 and pack(1, 1, G=3) == 3
    assert pack(65, 1) == pack(1000, 3000) == 1


def test_what_it_refuses():
    shape = lambda B, H=8: jax.ShapeDtypeStruct((B, 1, 4, 1, H), "bfloat16")
    run = lambda q: mosaic_gpu.neighborhood_attention(q, q, q, scale=1.0)
    with pytest.raises(NotImplementedError, match="takes 65535 packs of groups, not 65536"):
        jax.eval_shape(run, shape(2**16))
    with pytest.raises(NotImplementedError, match="heads of 256 in bfloat16, not 264"):
        jax.eval_shape(run, shape(1, 264))
