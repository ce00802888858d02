"""Accelerators that needn't be here: their own compilers run on a CPU.

    compiled = targets.compile_for("v5p:2x2x1", fn, jax.ShapeDtypeStruct((4096, 128), "bfloat16"))
    compiled.as_text(), compiled.memory_analysis()

A target is a TPU with its chips along each axis, or an H100 with how many of them: "v5e:4x8",
"v5p:2x2x1", "v6e:2x2", "h100:1", "h100:8", "h100:2x8" for two hosts of eight.

Needs the extra `plan`, and JAX_PLATFORMS=cpu, or JAX looks for the accelerators themselves. Nothing
is tuned by measuring, as it would be on a GPU: there the executable isn't quite the one to run.
"""

import functools
import os
import pathlib
import re
from collections.abc import Callable

import jax
from jax.experimental import topologies

_TPUS = {"v5e": 2, "v5p": 3, "v6e": 2}  # how many axes their chips lie along
_H100 = pathlib.Path(__file__).with_name("h100.txtpb")


@functools.cache
def devices(target: str) -> tuple[jax.Device, ...]:
    """The devices of a target, to build a mesh of or to place shapes on; none can run anything.

    Raises ValueError for a target that there isn't, NotImplementedError without its compiler.
    """
    found = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", target)
    chip, axes = (found[1], found[2].split("x")) if found else ("", [])
    try:
        if chip in _TPUS and len(axes) == _TPUS[chip]:
            # libtpu would ask a cloud's servers which TPU this is
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
            # a host has 2 x 2 chips, or fewer where an axis has 1
            host = [*(min(int(n), 2) for n in axes[:2]), 1]
            about = dict(chips_per_host_bounds=host)
            return tuple(topologies.get_topology_desc(target, "tpu", **about).devices)
        if chip == "h100" and len(axes) <= 2:
            shape = "x".join(["1"] * (3 - len(axes)) + axes)
            about = dict(target_config=_H100.read_text(), topology=shape)
            return tuple(topologies.get_topology_desc("", "cuda", **about).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"{target=} isn't one that can be built: {error}") from None
    except RuntimeError as error:
        raise NotImplementedError(f"{target=} needs the extra `plan`: {error}") from None
    raise ValueError(f"{target=} must be one as v5e:2x2, v5p:2x2x1, v6e:2x2, h100:1 or h100:2x8")


def compile_for(target: str, fn: Callable, *shapes) -> jax.stages.Compiled:
    """The executable of fn for a target: as_text() and memory_analysis() tell about it.

    Args:
      fn: traced as for that platform; with options of its own if it is a jax.jit already.
      shapes: trees of jax.ShapeDtypeStruct. One without a sharding is on the first device.

    Raises what the compilers raise: memory that doesn't suffice is a JaxRuntimeError, or a
    ValueError where it is the shared memory of a GPU's Pallas kernel.
    """
    first = devices(target)[0]
    place = jax.sharding.SingleDeviceSharding(first)
    placed = jax.tree.map(lambda x: x if x.sharding else x.update(sharding=place), shapes)
    platform = "cuda" if first.platform == "gpu" else first.platform
    jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
    return jitted.trace(*placed).lower(lowering_platforms=(platform,)).compile()
