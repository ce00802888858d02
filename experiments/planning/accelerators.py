"""What the makers publish about the accelerators that a plan can be made for.

Peaks are upper limits, of matrix products in bfloat16 and of all links together in one direction:
no program is faster, so times that are computed with them are lower bounds.
"""

import dataclasses
import math
import re

from attnjax.core import registry

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device. Rates are in operations or bytes a second."""

    name: str
    flops: float
    memory: float  # bytes
    bandwidth: float  # of the main memory
    links: float  # sent to other devices of the same island, over all links
    network: float  # sent to other islands; 0 where all devices are one island
    cache: int  # bytes of a cache before main memory; 0 where what stays on the chip is marked
    refuses: bool  # whether its compiler itself refuses a program that doesn't fit
    compiler: str
    topologies: str
    source: str


_GOOGLE = "https://docs.cloud.google.com/tpu/docs/"
ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator(
            name="v5e", flops=197e12, memory=16 * 2**30, bandwidth=819e9, links=200e9, network=0,
            cache=0, refuses=True, compiler="libtpu", topologies=", ".join(_FLAT),
            source=_GOOGLE + "v5e",
        ),
        Accelerator(
            name="v6e", flops=918e12, memory=32 * 2**30, bandwidth=1640e9, links=448e9, network=0,
            cache=0, refuses=True, compiler="libtpu", topologies=", ".join(_FLAT),
            source=_GOOGLE + "v6e",
        ),
        Accelerator(
            name="v5p", flops=459e12, memory=95 * 2**30, bandwidth=2765e9, links=600e9, network=0,
            cache=0, refuses=True, compiler="libtpu",
            topologies="2x2x1, 2x2x2, 2x2x4, 2x4x4 and multiples of 4 up to 6144 chips, as 4x4x8",
            source=_GOOGLE + "v5p",
        ),
        Accelerator(  # memory is what the driver leaves: experiments/h100.txtpb
            name="h100", flops=989.4e12, memory=84_978_434_048, bandwidth=3352e9, links=450e9,
            network=50e9, cache=50 * 2**20, refuses=False, compiler="the CUDA plugin of jax",
            topologies="1 to 8 on a host, or hosts x devices, as 2x8",
            source="https://www.nvidia.com/en-us/data-center/h100/ (SXM); "
            "https://www.nvidia.com/en-us/data-center/dgx-h100/ (400 Gb/s a device between hosts)",
        ),
    )
}  # fmt: skip


def of_target(target: str) -> Accelerator:
    """That of "v5p:4x4x4"; ValueError, saying what there is, for another name or topology."""
    name, _, topology = target.partition(":")
    if name not in ACCELERATORS:
        near = registry.nearest(name.lower(), ACCELERATORS)
        known = f"; there are {', '.join(ACCELERATORS)}, as in v5e:4x4, v5p:4x4x4 or h100:2x8"
        raise ValueError(f"no accelerator is called {name!r}{near or known}")
    found = ACCELERATORS[name]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", topology) or not _exists(name, topology):
        raise ValueError(f"{name} has no topology {topology!r}: it has {found.topologies}")
    return found


def _exists(name, topology):
    sizes = [int(n) for n in topology.split("x")]
    if name == "h100":
        return len(sizes) <= 2 and sizes[-1] <= 8
    if name == "v5p":
        cubes = all(n % 4 == 0 for n in sizes) and math.prod(sizes) <= 6144
        small = topology in ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
        return small or (len(sizes) == 3 and cubes)
    return topology in _FLAT
