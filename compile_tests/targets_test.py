"""What a target's name gives, and what is said of one that gives nothing."""

import re

import jax
import jax.numpy as jnp
import pytest

from experiments import targets


@pytest.mark.parametrize(
    ("target", "count", "kind", "hosts"),
    [
        ("v5e:4x8", 32, "TPU v5 lite", 8),
        ("v5p:2x2x4", 16, "TPU v5", 4),
        ("v6e:2x2", 4, "TPU v6 lite", 1),
        ("h100:8", 8, "NVIDIA H100 80GB HBM3", 1),
        ("h100:2x8", 16, "NVIDIA H100 80GB HBM3", 2),
    ],
)
def test_devices(target, count, kind, hosts):
    devices = targets.devices(target)
    assert len(devices) == count
    assert {device.device_kind for device in devices} == {kind}
    assert len({device.process_index for device in devices}) == hosts


@pytest.mark.parametrize("target", ["v5e", "v5e:0x1", "v5e:1x1x1", "v5p:2x2", "a100:8", "h100:"])
def test_a_target_that_there_is_not(target):
    with pytest.raises(ValueError, match=re.escape(f"{target=} must be one as v5e:2x2")):
        targets.devices(target)


def test_a_target_that_cannot_be_built():
    with pytest.raises(ValueError, match="'v5e:3x5' isn't one that can be built: .*divisible"):
        targets.devices("v5e:3x5")


@pytest.mark.parametrize(("target", "dtype_size"), [("v5e:2x2", 2), ("h100:8", 2)])
def test_shapes_keep_their_places(target, dtype_size):
    """Over all devices where the caller says so: each holds its part, and they communicate."""
    devices = targets.devices(target)
    mesh = jax.make_mesh((len(devices),), ("x",), (jax.sharding.AxisType.Auto,), devices=devices)
    split = jax.sharding.NamedSharding(mesh, jax.P("x"))
    shape = jax.ShapeDtypeStruct((64, 128), jnp.bfloat16, sharding=split)
    compiled = targets.compile_for(target, lambda x: x.sum(), shape)
    assert "all-reduce" in compiled.as_text()
    size = compiled.memory_analysis().argument_size_in_bytes
    assert size == 64 * 128 * dtype_size // len(devices)


@pytest.mark.parametrize("target", ["v5e:2x2", "h100:1"])
def test_a_single_device_holds_shapes_without_a_place(target):
    donating = jax.jit(lambda tree: tree["x"] + 1, donate_argnums=0)
    compiled = targets.compile_for(target, donating, {"x": jax.ShapeDtypeStruct((64, 128), "f4")})
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == memory.alias_size_in_bytes == 64 * 128 * 4
