import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax import parallel
from attnjax.core import masks, registry
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import dropout
from tests.parallel import helpers

# every option of the operation, as a mechanism would have them
ANY = dataclasses.replace(registry.get("multi_head_attention"), fn=ops.dot_product_attention)
CAUSAL = masks.Causal()
SEGMENTS = masks.Segments(jnp.array([[0] * 6 + [1] * 2 + [2] * 8, [0] * 12 + [4] * 4]))
VALID = masks.Valid(jnp.arange(16)[None] < jnp.array([[16], [9]]))


def qkv(T=16, S=16, N=4, K=2, H=8, V=6, dtype="float32"):
    return helpers.normal((2, T, N, H), (2, S, K, H), (2, S, K, V), dtype=dtype)


@pytest.mark.parametrize("axes", helpers.MESHES.values(), ids=helpers.MESHES)
def test_equals_one_device_on_any_mesh(axes):
    mask = SEGMENTS & (masks.Window(5) | masks.Prefix(3)) & CAUSAL
    helpers.assert_same("ring", ANY, qkv(), axes=axes, mask=mask)


@pytest.mark.parametrize(
    "mask",
    [
        None,
        masks.Window(6, 1),
        VALID & CAUSAL,
        CAUSAL | masks.Prefix(9),
        masks.Dense(jnp.tril(jnp.ones((2, 4, 16, 16), bool), -2)),
        masks.Neighborhood((4, 4), (3, 3)),
    ],
    ids=["none", "window", "padding", "prefix", "dense", "neighborhood"],
)
def test_masks(mask):
    ring = parallel.shard("ring", ANY, helpers.mesh(context=2, tensor=2))
    run = jax.jit(lambda *arrays: [fn(*arrays, mask=mask) for fn in (ring, ANY.fn)])
    chex.assert_trees_all_close(*run(*qkv()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (5, 14)])
def test_lengths_that_do_not_divide(T, S):
    helpers.assert_same("ring", ANY, qkv(T, S), axes=dict(context=4))


@pytest.mark.parametrize(("N", "K"), [(4, 1), (3, 3)], ids=["one key head", "odd heads"])
def test_heads_that_do_not_divide(N, K):
    axes = dict(context=2, tensor=2)
    helpers.assert_same("ring", ANY, qkv(N=N, K=K), axes=axes, mask=CAUSAL)


def test_other_options():
    options = dict(mask=CAUSAL, scale=0.7, softcap=2.0, implementation="blocked")
    helpers.assert_same("ring", ANY, qkv(), axes=dict(data=2, context=2), **options)


def test_sinks():
    sinks = jnp.array([0.5, -1.0, 2.0, 0.0])
    attend = lambda q, k, v, sinks: ops.dot_product_attention(q, k, v, mask=VALID, sinks=sinks)
    ring = parallel.shard("ring", ANY, helpers.mesh(context=2, tensor=2))
    sharded = lambda q, k, v, sinks: ring(q, k, v, mask=VALID, sinks=sinks)
    actual, expected = (helpers.with_gradients(f)(*qkv(), sinks) for f in (sharded, attend))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_query_that_sees_nothing_is_zero():
    valid = jnp.ones((2, 16), bool).at[1].set(False)
    ring = parallel.shard("ring", ANY, helpers.mesh(context=4))
    out, grads = helpers.with_gradients(ring, mask=masks.Valid(valid))(*qkv())
    chex.assert_tree_all_finite((out, grads))
    assert not any(x[1].any() for x in (out, *grads)) and out[0].any()


def test_bfloat16():
    rounded = qkv(dtype="bfloat16")
    exact = [x.astype(jnp.float32) for x in rounded]
    ring = parallel.shard("ring", ANY, helpers.mesh(context=4))
    run = lambda f, arrays: helpers.with_gradients(f, mask=CAUSAL)(*arrays)
    truth = run(ANY.fn, exact)
    for actual, naive, x in zip(
        *(jax.tree.leaves(t) for t in (run(ring, rounded), run(ANY.fn, rounded), truth)),
        strict=True,
    ):
        assert actual.dtype == jnp.bfloat16
        assert helpers.rms(actual - x) <= 2 * helpers.rms(naive - x) + 2**-9 * helpers.rms(x)


def compiled(size, T=2**16):
    """A gradient over `size` devices."""
    mesh = helpers.mesh(context=size)
    ring = parallel.shard("ring", registry.get("gqa"), mesh)
    loss = lambda q, k, v: (ring(q, k, v, mask=CAUSAL).astype(jnp.float32) ** 2).sum()
    split = jax.NamedSharding(mesh, jax.P(None, "context"))
    array = lambda heads: jax.ShapeDtypeStruct((1, T, heads, 16), jnp.bfloat16, sharding=split)
    run = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=split)
    return run.lower(array(4), array(2), array(2)).compile()


def test_memory_falls_with_devices_and_keys_are_never_gathered():
    used = {}
    for size in (2, 4):
        program = compiled(size)
        used[size] = program.memory_analysis().temp_size_in_bytes
        text = program.as_text()
        assert "collective-permute" in text and "all-gather" not in text
    assert used[4] < 0.6 * used[2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bias", jnp.zeros((1, 1, 16, 16))),
        ("dropout", dropout.Dropout(0.1, helpers.KEY)),
        ("score_mod", lambda score, b, n, t, s: score),
        ("q_offset", 3),
        ("return_lse", True),
    ],
)
def test_refuses(name, value):
    ring = parallel.shard("ring", ANY, helpers.mesh(context=4))
    with pytest.raises(NotImplementedError, match=f"ring can't honour {name}; it can .*mask"):
        ring(*qkv(), **{name: value})
