"""Where a kernel may be called: XLA can't partition one over devices by itself."""

from collections.abc import Callable

import jax

from pallas_kernels import refusal, tables

_INSTEAD = "implementation='xla' needs none, 'interpret' runs the one for TPU anywhere, slowly"


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


def run(
    args: tuple,
    implementation: str | None,
    *,
    xla: Callable,
    tpu: Callable,
    gpu: Callable | None = None,
    fits=True,
    row: tables.Row | None = None,
):
    """What a kernel, `tpu(*args)` or `gpu(*args)`, or `xla(*args)` returns, as implementation says.

    "xla" and "pallas" ask for one of them; "interpret" is the one for TPU, which also takes
    `interpret`, on any platform. None is the kernel where the call is lowered for TPU, runs whole
    on each device and `fits` that; but what `row` names, of the table in force, on its platform.
    Where it is lowered, NotImplementedError is raised for a platform without a kernel, and for
    what a kernel raised it for.
    """
    match implementation:
        case None if (fits or row is not None) and whole():
            kernels = _by_default(row, xla, tpu if fits else xla, gpu)
            return jax.lax.platform_dependent(*args, default=xla, **kernels)
        case None | "xla":
            return xla(*args)
        case "interpret":
            return tpu(*args, interpret=True)
    refuse = lambda reason: lambda *args: refusal.refuse(reason, xla(*args))
    kernels = {"tpu": tpu} | ({"cuda": gpu} if gpu else {})
    default = refuse(f"there is a kernel for {', '.join(kernels)} only; {_INSTEAD}")
    otherwise = lambda error: refuse(f"{error}; {_INSTEAD}")
    kernels = {platform: _or_else(kernel, otherwise) for platform, kernel in kernels.items()}
    return jax.lax.platform_dependent(*args, default=default, **kernels)


def _by_default(row, xla, tpu, gpu):
    """{platform: kernel} of those that are taken without being asked for."""
    found = {"tpu": tpu}
    if row is not None:
        here = tables.here().platform
        choices = {"xla": xla, "pallas": {"tpu": tpu, "cuda": gpu}.get(here)}
        if (chosen := choices.get(row.implementation)) is None:
            raise ValueError(f"{row} must name 'xla', or a kernel that there is for {here}")
        found[here] = _or_else(chosen, lambda error: xla)
    return found


def _or_else(kernel, otherwise):
    """What `kernel` returns, or where it refuses what `otherwise(error)` does."""

    def attempt(*args):
        try:
            return kernel(*args)
        except NotImplementedError as error:
            return otherwise(error)(*args)

    return attempt
