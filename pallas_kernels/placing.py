"""Where a kernel may be called: XLA can't partition one over devices by itself."""

from collections.abc import Callable

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


def run(args: tuple, implementation: str | None, *, xla: Callable, tpu: Callable, fits=True):
    """`tpu(*args)`, a kernel that also takes `interpret`, or `xla(*args)`, as implementation says.

    "xla", "pallas" and "interpret" ask for one of them; None is the kernel where the call is
    lowered for TPU, runs whole on each device and `fits`.
    """
    match implementation:
        case None if fits and whole():
            return jax.lax.platform_dependent(*args, tpu=tpu, default=xla)
        case None | "xla":
            return xla(*args)
        case _:
            return tpu(*args, interpret=implementation == "interpret")
