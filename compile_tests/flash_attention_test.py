"""The kernels of flash_attention, compiled for every TPU and for H100, at the sizes each gets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import dropout
from compile_tests import calls
from experiments import targets

LONG = 128 * 1024
NAMES = ["flash_attention", "flash_attention_dq", "flash_attention_dkv"]
APART = ["flash_attention", "flash_attention_dq", "flash_attention_dk", "flash_attention_dv"]


def compile_on(target, fn, args):
    """(calls of kernels, executable), traced as on that TPU: tiles depend on its kind."""
    mesh = jax.sharding.Mesh(np.array(targets.devices(target)[:1]), ("x",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = targets.compile_for(target, fn, args)
    return calls.kernels(compiled), compiled


def arrays(T, dtype, *, N=2, K=2, H=128, V=128, **more):
    token = lambda heads, size: jax.ShapeDtypeStruct((1, T, heads, size), dtype)
    return dict(q=token(N, H), k=token(K, H), v=token(K, V)) | more


def every_option(T, N, dtype, bias, **sizes):
    """Arguments with all that isn't a mask."""
    more = dict(sinks=jax.ShapeDtypeStruct((N,), "float32"))
    more |= dict(segments=jax.ShapeDtypeStruct((1, T), "int32"))
    more |= dict(bias=jax.ShapeDtypeStruct(bias, dtype))
    more |= dict(key=jax.eval_shape(lambda: jax.random.key(0)))
    return arrays(T, dtype, N=N, **sizes, **more)


def attend(args, **options):
    """Causal; with documents and other options if args has them."""
    args = dict(args)
    q, k, v = (args.pop(name) for name in "qkv")
    options = dict(mask=masks.Causal()) | options
    if "segments" in args:
        options["mask"] &= masks.Segments(args.pop("segments"))
        options |= dict(softcap=30.0)
    if "key" in args:
        options |= dict(dropout=dropout.Dropout(0.1, args.pop("key")))
    return ops.dot_product_attention(q, k, v, return_lse=True, **args, **options)


def gradients(args, **options):
    """By cotangents of output and lse both."""
    inexact = {name: x for name, x in args.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    out, vjp = jax.vjp(lambda inexact: attend(args | inexact, **options), inexact)
    return vjp(jax.tree.map(jnp.ones_like, out))


@pytest.mark.parametrize("target", calls.TPUS)
@pytest.mark.parametrize("T", [4096, LONG])
def test_causal_bfloat16(target, T):
    found, compiled = compile_on(target, gradients, arrays(T, "bfloat16"))
    assert sorted(x.name for x in found) == sorted(NAMES)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 3 * memory.argument_size_in_bytes  # no T S anywhere


@pytest.mark.parametrize(
    ("target", "dtype"),
    [("v5e:2x2", "bfloat16"), ("v5p:2x2x1", "float32"), ("v6e:2x2", "bfloat16")],
)
def test_every_option(target, dtype):
    T, N = 4000, 4  # the last tile is part of one
    args = every_option(T, N, dtype, (1, N, T, T), H=192)
    found, _ = compile_on(target, gradients, args)
    assert sorted(x.name for x in found) == sorted([*NAMES, "flash_attention_dbias"])


def modified(args, make, **options):
    """`gradients` with a score_mod by slopes of each head and a bound, both learned."""

    def attend_to(args):
        score_mod = make(args.pop("slopes"), args.pop("cap"))
        return attend(args, score_mod=score_mod, **options)

    out, vjp = jax.vjp(lambda args: attend_to(dict(args)), args)
    return vjp(jax.tree.map(jnp.ones_like, out))


def bounded(slopes, cap):
    return lambda x, b, n, t, s: cap * jnp.tanh(x / cap) - slopes[n] * abs(t - s)


def elementary(slopes, cap):
    """What stands for operations that Mosaic has not, or not for each dtype."""

    def score_mod(x, b, n, t, s):
        x = cap * jnp.tanh(x / cap) - jnp.log1p(abs(x)) * (abs(t - s) + 1.0) ** -slopes[n]
        wave = jnp.floor(x) * jnp.cos(cap * (t - s))
        return jnp.where(~(t % 3 == 0) | b.astype(bool), x, wave)

    return score_mod


LEARNED = dict(
    slopes=jax.ShapeDtypeStruct((2,), "float32"), cap=jax.ShapeDtypeStruct((), "float32")
)


def test_score_mod():
    fn = functools.partial(modified, make=bounded)
    found, _ = compile_on("v5e:2x2", fn, arrays(512, "bfloat16", **LEARNED))
    assert sorted(x.name for x in found) == sorted([*NAMES, "flash_attention_dfactors"])


by_kernel = functools.partial(gradients, implementation="pallas")


@pytest.mark.parametrize(
    ("T", "H", "names"),
    [(4096, 64, NAMES), (LONG, 128, NAMES), (LONG, 256, APART)],
)
def test_h100(T, H, names):
    """Mosaic itself refuses what needs more shared memory than there is."""
    compiled = targets.compile_for("h100:1", by_kernel, arrays(T, "bfloat16", K=1, H=H, V=H))
    assert sorted(x.name for x in calls.kernels(compiled)) == sorted(names)
    memory = compiled.memory_analysis()
    lists = 2 * 4 * (T // 128) ** 2  # of tiles, for rows and for columns
    assert memory.temp_size_in_bytes < 3 * memory.argument_size_in_bytes + lists  # no T S anywhere


def test_h100_every_option_and_mask():
    T, N = 250, 4
    mask = masks.Neighborhood((25, 10), (7, 7), stride=(2, 1)) | masks.Window(5, None)
    mask &= masks.Dense(jnp.ones((1, N, T, T), bool)) | masks.Prefix(9)
    fn = functools.partial(by_kernel, mask=mask)
    args = every_option(T, N, "float16", (1, 1, T, T), H=192, V=96)
    found = calls.kernels(targets.compile_for("h100:1", fn, args))
    assert sorted(x.name for x in found) == sorted([*APART, "flash_attention_dbias"])


def test_h100_float32():
    args = arrays(LONG, "float32", bias=jax.ShapeDtypeStruct((1, 2, 1, LONG), "float32"))
    found = calls.kernels(targets.compile_for("h100:1", by_kernel, args))
    assert sorted(x.name for x in found) == sorted([*NAMES, "flash_attention_dbias"])


def test_h100_score_mod():
    fn = functools.partial(modified, make=elementary, implementation="pallas")
    args = arrays(4000, "bfloat16", K=1, **LEARNED)
    found = calls.kernels(targets.compile_for("h100:1", fn, args))
    assert sorted(x.name for x in found) == sorted([*NAMES, "flash_attention_dfactors"])


def test_h100_within_a_mesh():
    mesh = jax.sharding.Mesh(np.array(targets.devices("h100:2")), ("x",))
    heads = jax.P(None, None, "x")
    fn = jax.shard_map(by_kernel, mesh=mesh, in_specs=heads, out_specs=heads)
    place = jax.sharding.NamedSharding(mesh, heads)
    args = jax.tree.map(lambda x: x.update(sharding=place), arrays(4096, "bfloat16"))
    found = calls.kernels(targets.compile_for("h100:2", fn, args))
    assert sorted(x.name for x in found) == sorted(NAMES)
