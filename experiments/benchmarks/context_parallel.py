"""Softmax attention and chosen blocks by every strategy of context parallelism, under six masks.

    attnjax benchmark context_parallel
    attnjax benchmark context_parallel --masks causal --lengths 512 2048 --devices 4 8
    attnjax benchmark context_parallel --target v5e:4x4 --masks causal --only ring gather

Masks, strategies and scales as in Long-Context Attention Benchmark (LongCA-bench). How to read it:
docs/benchmarks/context_parallel.md.
"""

import dataclasses
import logging
import pathlib
import re
import sys

import jax

from experiments import config as configs

PAPERS = ("longca-bench",)
TOLERANCE = 1e-5
_SMALL = dict(heads=8, kv_heads=2, head_dim=32, dtype="float32")
_LARGE = dict(heads=32, kv_heads=8, head_dim=128, dtype="bfloat16")


@dataclasses.dataclass(frozen=True)
class Config:
    """Strategies of context parallelism: time, memory, bytes sent, and exactness.

    Times are of CPU devices that share this machine's cores: the work of all devices together,
    never how fast several are. With a target nothing is run, but compiled for its devices.
    """

    target: str = ""
    """Accelerator and topology to compile for in place of running here: v5e:4x4, h100:8, h100:2x8.
    Needs the extra `plan`."""
    masks: tuple[str, ...] = ()
    """Of full, causal, sliding, document, shared-prefix and block; all where none is named."""
    lengths: tuple[int, ...] = ()
    """Tokens; 1024 where none is named, and for a target 32768, 131072 and 786432."""
    devices: tuple[int, ...] = ()
    """How many devices are emulated: 8 where none is named. A target has its own."""
    only: tuple[str, ...] = ()
    """Strategies and implementations to compare, as in "ring(order='zigzag')" and dense; all where
    none is named."""
    runs: int = 3
    """Runs of each on this machine, after one that is not counted; they take turns."""
    gigabytes: float = 4.0
    """What needs more for its temporaries on all devices is compiled here, but not run."""
    out: pathlib.Path | None = None
    """JSON file, with a page and pictures beside it; rows that it has already of other cells stay.
    Where None, context_parallel_cpu.json in docs/benchmarks or as the target; nowhere if quick."""
    quick: bool = False
    """Try it out: one mask, a short length, no strategy with options; of a target's just gather."""


def run(config: Config) -> int:
    """Measures and writes: 1 where an error is above 1e-5, 2 for what can't be measured."""
    from experiments.context_benchmark import results, tables

    try:
        config = _settled(config)
        devices = _devices(config)
        groups = _groups(config, len(devices))
        sizes = _LARGE if config.target else _SMALL
        limits = {} if config.target else dict(runs=config.runs, gigabytes=config.gigabytes)
        about = results.circumstances(config.target, sizes | limits)
        old = results.kept(config.out, about)
    except ValueError as error:
        print(f"attnjax benchmark: {error}", file=sys.stderr)
        return 2
    new = []
    for rows in _measured(config, groups, devices, sizes, limits):
        new += rows
        if config.out is not None:  # so that what was measured is there if the rest is not
            results.write(about, results.joined(old, new), config.out)
    tables.show(about | {"rows": new})
    if config.out is not None:
        results.draw(config.out)
    return int(any(row.get("error", 0.0) > TOLERANCE for row in new))


def _settled(config):
    """With what stands for an empty option; ValueError for one that a target has no use for."""
    if config.target and config.devices:
        raise ValueError(f"devices={config.devices} must not be given: they are those of --target")
    lengths = (32768, 131072, 786432) if config.target else (1024,)
    devices, masks = config.devices or (8,), config.masks
    if config.quick:
        lengths, devices, masks = (4096 if config.target else 256,), devices[:1], ("sliding",)
    name = re.sub(r"\W+", "_", config.target or "cpu")
    out = configs.ROOT / f"docs/benchmarks/context_parallel_{name}.json"
    return dataclasses.replace(
        config,
        lengths=config.lengths or lengths,
        masks=config.masks or masks,
        devices=devices,
        out=config.out or (None if config.quick else out),
    )


def _devices(config):
    """Of the target, or as many as are emulated."""
    if not config.target:
        configs.emulate(max(config.devices))
        return jax.devices()
    from experiments.planning import mesh

    return mesh.devices(config.target)


def _groups(config, devices):
    """Lists of cells that compute the same; ValueError for what there isn't."""
    from experiments.context_benchmark import cells
    from experiments.context_benchmark import masks as context_masks

    known = list(context_masks.by_name(64))
    for mask in config.masks:
        if mask not in known:
            raise ValueError(f"{mask=} must be one of {', '.join(known)}")
    names = cells.ways()
    for name in config.only:
        if name not in names:
            raise ValueError(f"{name!r} must be one of {', '.join(names)}")
    sizes, only = (devices,) if config.target else config.devices, config.only
    if config.quick:
        only = only or (("gather",) if config.target else [x for x in names if "(" not in x])
    groups = [
        cells.of(function, mask, length, sizes, only)
        for mask in config.masks or known
        for length in config.lengths
        for function in cells.functions()
    ]
    return [group for group in groups if group]


def _measured(config, groups, devices, sizes, limits):
    """Rows of a group after another."""
    import rich.progress

    from experiments.context_benchmark import cells
    from experiments.context_benchmark import rows as context_rows

    place = context_rows.Place(devices, cells.Sizes(**sizes), config.target, **limits)
    logging.disable(logging.WARNING)  # a CUDA compiler warns of the GPU that isn't here
    with rich.progress.Progress() as progress:
        bar = progress.add_task("", total=sum(map(len, groups)))
        for group in groups:
            progress.update(bar, description=str(group[0]).rpartition(": ")[0])
            yield context_rows.of(group, place, lambda: progress.advance(bar))
    logging.disable(logging.NOTSET)
