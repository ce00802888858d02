import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax import parallel
from attnjax.core import masks, registry
from attnjax.ops import dot_product_attention as ops
from tests.parallel import helpers, traffic

GQA = registry.get("gqa")
CAUSAL = masks.Causal()


def qkv(T=8, N=8, K=4):
    return helpers.normal((2, T, N, 4), (2, T, K, 4), (2, T, K, 3))


def test_heads_lie_over_both_axes():
    axes = dict(context=2, tensor=2)
    helpers.assert_same("tensor", GQA, qkv(N=8, K=2), axes, mask=CAUSAL)


def test_nothing_is_sent_and_each_device_has_its_heads():
    q, k, v = qkv()
    by_heads = parallel.shard("tensor", GQA, helpers.mesh(context=4), by_tokens=False)
    fn = functools.partial(by_heads, mask=CAUSAL)
    assert traffic.sent(fn, dict(q=q, k=k, v=v)) == 0
    out = jax.jit(fn)(q, k, v)
    assert {shard.data.shape for shard in out.addressable_shards} == {(2, 8, 2, 3)}


def test_one_matrix_for_all_heads_has_its_gradient():
    """Of tokens over devices: the compiler, left to itself, adds up some of it only."""
    mesh = helpers.mesh(data=2, context=2)
    place = jax.NamedSharding(mesh, jax.P("data", "context"))
    x, first, second = helpers.normal((4, 32, 16), (16, 4, 8), (8, 8))
    k, v = helpers.normal((4, 32, 4, 8), (4, 32, 4, 8))

    def gradients(fn, x):
        heads = lambda w: jnp.einsum("BTD,DNH->BTNH", x, w[0]) @ w[1]
        return jax.grad(lambda w: (fn(heads(w), k, v) ** 2).sum())((first, second))

    fn = parallel.shard("tensor", GQA, mesh)
    expected = gradients(GQA.fn, x)
    actual = jax.jit(functools.partial(gradients, fn))(jax.device_put(x, place))
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", ["context", "tensor"])
def test_axis_is_where_heads_lie(axis):
    mesh = helpers.mesh(tensor=2, context=1) if axis == "tensor" else helpers.mesh(context=2)
    fn = parallel.shard("tensor", GQA, mesh, axis=axis)
    out = jax.eval_shape(fn, *qkv())
    assert out.shape == (2, 8, 8, 3)


def test_activations_of_a_device_fall_as_devices_rise():
    """Distributed attention by heads and by sequence: a quarter of the bytes on four devices."""
    shape = jax.ShapeDtypeStruct((1, 512, 4, 8), jnp.float32)

    def used(fn):
        loss = lambda q, k, v: (fn(q, k, v, mask=CAUSAL, implementation="dense") ** 2).sum()
        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
        return program.memory_analysis().temp_size_in_bytes

    whole = used(GQA.fn)
    for strategy in ("tensor", "ring"):
        assert used(parallel.shard(strategy, GQA, helpers.mesh(context=4))) < 0.3 * whole


def test_what_names_all_to_all_has_it():
    assert "tensor" in parallel.strategies(registry.get("delta_net"))
    assert "tensor" not in parallel.strategies(registry.get("mamba"))


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        (dict(N=6, K=3), {}, r"tensor can't split N=6 heads over 4 devices, ring or .* can"),
        ({}, dict(return_lse=True), "tensor can't honour return_lse, no strategy can"),
    ],
    ids=str,
)
def test_refuses(sizes, options, message):
    record = dataclasses.replace(GQA, fn=ops.dot_product_attention)
    fn = parallel.shard("tensor", record, helpers.mesh(context=4))
    with pytest.raises(NotImplementedError, match=message):
        fn(*qkv(**sizes), **options)


def test_only_what_splits_no_tokens_can_be_told_how_they_lie():
    with pytest.raises(ValueError, match="by_tokens=False is for tensor and latent: ring splits"):
        parallel.shard("ring", GQA, helpers.mesh(context=4), by_tokens=False)
