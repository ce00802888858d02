"""Meshes, and where parameters live, by their path: the modules know nothing of either."""

import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.core import torus

AXES = ("data", "fsdp", "context", "tensor")
BATCH = P(("data", "fsdp"), "context")  # of an array (B T ...)

# The first pattern found in "a/b/kernel" wins.
RULES: tuple[tuple[str, P], ...] = (
    (r"/heads/kernel$", P("fsdp", "tensor", None)),  # D N H
    (r"/merge/kernel$", P("tensor", None, "fsdp")),  # N H D
    (r"/(up|gate)/dense/kernel$", P("fsdp", "tensor")),  # D F
    (r"/down/dense/kernel$", P("tensor", "fsdp")),  # F D
    (r"/dense/kernel$", P("fsdp", None)),
    (r"/embedding$", P(None, "fsdp")),  # vocabulary D
    (r"/conv/kernel$", P()),
    (r"/(table|scale|bias)$", P()),
)


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the four axes of attnjax, each of the given size; all of them Auto.

    On TPUs the devices of `context` are rings of neighbours where that is possible (`core.torus`).
    Else an axis lies along whole axes of the torus, or, where no product of them is of its size,
    along a part of one, so that some of its neighbours are further apart.

    Raises ValueError where the sizes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = (data, fsdp, context, tensor)
    size = data * fsdp * context * tensor
    if size != len(devices):
        named = " x ".join(f"{name}={n}" for name, n in zip(AXES, shape, strict=True))
        raise ValueError(f"mesh {named} needs {size} devices, there are {len(devices)}")
    types = (AxisType.Auto,) * 4
    rings = _rings(devices, context, tensor)
    if rings is not None:
        return Mesh(rings.reshape(shape), AXES, axis_types=types)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # no product of whole axes of the torus is of that size
        split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(split, AXES, axis_types=types)


def _rings(devices, context, tensor):
    """Of TPUs, (groups context tensor), where a ring of neighbours can be had; else None."""
    places = [getattr(device, "coords", None) for device in devices]
    if context == 1 or None in places:
        return None
    rings = torus.in_rings(np.array(places), context, tensor)
    return None if rings is None else np.array(devices, object)[rings]


def partition_specs(params, rules=RULES):
    """A tree of PartitionSpecs shaped like params; KeyError for a parameter without a rule.

    A leaf stacked over layers by a scan has one axis more in front, which is never sharded.
    """

    def spec(path, leaf):
        name = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, spec in rules:
            if re.search(pattern, name):
                lead = leaf.ndim - len(spec) if spec and "/layers/" in name else 0
                return P(*(None,) * lead, *spec)
        raise KeyError(f"no sharding rule for parameter {name!r}")

    return jax.tree.map_with_path(spec, params)


def shardings(mesh: Mesh, params, rules=RULES):
    """A tree of NamedShardings shaped like params.

    An axis that doesn't divide evenly over its mesh axes is kept whole: a parameter of three
    heads on two devices is replicated, not refused.
    """

    def place(leaf, spec):
        fits = lambda size, axes: axes is None or size % _extent(mesh, axes) == 0
        kept = (a if fits(n, a) else None for n, a in zip(leaf.shape, spec, strict=False))
        return NamedSharding(mesh, P(*kept))

    return jax.tree.map(place, params, partition_specs(params, rules))


def _extent(mesh: Mesh, axes) -> int:
    names = (axes,) if isinstance(axes, str) else axes
    size = 1
    for name in names:
        size *= mesh.shape[name]
    return size
