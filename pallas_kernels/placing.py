"""Where a kernel may be called: XLA can't partition one over devices by itself."""

import jax


def whole() -> bool:
    """Whether what is traced here runs as it stands on each device.

    So it is within a shard_map over every axis of its mesh, or where there is one device only.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    manual = jax.sharding.AxisType.Manual
    pairs = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return all(kind == manual or size == 1 for kind, size in pairs)
