"""The devices that a plan is for, and the mesh over them that training would make."""

import os

import jax

from attnjax.core import sharding
from experiments import targets
from experiments.planning import accelerators


def devices(target: str) -> tuple[jax.Device, ...]:
    """Of a target; ValueError, in one line, where there is none or its compiler isn't installed."""
    accelerator = accelerators.of_target(target)
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # else libtpu warns, of
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # what no compilation needs
    try:
        return targets.devices(target)
    except ValueError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    except (RuntimeError, NotImplementedError, ModuleNotFoundError):
        raise ValueError(
            f"{target} needs {accelerator.compiler}: pip install 'attnjax[plan]'"
        ) from None


def make_mesh(config, target: str) -> jax.sharding.Mesh:
    """The mesh of a config over the devices of a target, as training makes it over those it has."""
    there, sizes = devices(target), config.mesh
    rest = sizes.fsdp * sizes.context * sizes.tensor
    data = sizes.data or max(len(there) // rest, 1)
    if data * rest != len(there):
        named = f"data={data} fsdp={sizes.fsdp} context={sizes.context} tensor={sizes.tensor}"
        raise ValueError(
            f"mesh {named} needs {data * rest} devices, {target} has {len(there)}: "
            f"let their product be {len(there)}, or data be 0 and the others' divide it"
        )
    pieces = data * sizes.fsdp * config.accumulate
    if config.batch_size % pieces:
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of {pieces} = "
            f"data * fsdp * accumulate"
        )
    options = dict(fsdp=sizes.fsdp, context=sizes.context, tensor=sizes.tensor)
    return sharding.make_mesh(data=data, **options, devices=there)
