"""Meshes, and the place of a parameter by its path."""

import jax
import jax.numpy as jnp
import pytest

from attnjax.core import sharding
from attnjax.softmax import multi_head_attention as mha


def named(path, *shape):
    *folders, leaf = path.split("/")
    tree = {leaf: jax.ShapeDtypeStruct(shape, jnp.float32)}
    for folder in reversed(folders):
        tree = {folder: tree}
    return tree


def spec(path, *shape):
    return jax.tree.leaves(sharding.partition_specs(named(path, *shape)))[0]


def test_a_mesh_has_every_axis():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    assert mesh.shape == dict(data=1, fsdp=2, context=1, tensor=2)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    two = jax.devices()[2:]
    assert list(sharding.make_mesh(context=2, devices=two).devices.flat) == two


def test_a_mesh_needs_as_many_devices_as_there_are():
    with pytest.raises(ValueError, match="data=3 x fsdp=1 .* needs 3 devices, there are 4"):
        sharding.make_mesh(data=3)


def test_specs_follow_the_last_parts_of_a_path():
    assert spec("block_0/query/heads/kernel", 8, 2, 4) == jax.P("fsdp", "tensor", None)
    assert spec("block_0/out/merge/kernel", 2, 4, 8) == jax.P("tensor", None, "fsdp")
    assert spec("up/dense/kernel", 8, 16) == jax.P("fsdp", "tensor")
    assert spec("down/dense/kernel", 16, 8) == jax.P("tensor", "fsdp")
    assert spec("block/other/dense/kernel", 8, 3) == jax.P("fsdp", None)
    assert spec("norm/scale", 8) == spec("relative/table", 2, 9) == jax.P()


def test_layers_of_a_scan_are_stacked_in_front():
    assert spec("layers/mixer/query/heads/kernel", 6, 8, 2, 4) == jax.P(
        None, "fsdp", "tensor", None
    )
    assert spec("layers/norm/scale", 6, 8) == jax.P()


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(KeyError, match="no sharding rule for parameter '/block/novel'"):
        sharding.partition_specs(named("block/novel", 3))


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    place = lambda *shape: jax.tree.leaves(
        sharding.shardings(mesh, named("q/heads/kernel", *shape))
    )
    assert place(8, 2, 4)[0].spec == jax.P("fsdp", "tensor", None)
    assert place(8, 3, 4)[0].spec == jax.P("fsdp", None, None)


def test_parameters_lie_where_the_rules_say():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    params = mha.MultiHeadAttention(2, 4).init(jax.random.key(0), jnp.ones((1, 3, 8)))
    placed = jax.device_put(params, sharding.shardings(mesh, params))
    kernel = placed["params"]["query"]["heads"]["kernel"]
    assert kernel.shape == (8, 2, 4) and kernel.addressable_shards[0].data.shape == (4, 1, 4)
