"""The training step of a config, compiled for accelerators that needn't be here."""

import contextlib
import dataclasses
import functools
import logging
import math
import re

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxlib import _hlo

from attnjax import parallel
from attnjax.core import registry
from experiments import config as configs
from experiments import dry_run, learning, placement, targets
from experiments.planning import accelerators, hlo
from experiments.planning import count as plan_count


@dataclasses.dataclass(frozen=True)
class Planned:
    """One compiled step, or why there is none. Bytes are those of one device."""

    strategy: str
    length: int  # of a sequence, or of an image in tokens as the task gives it
    fits: bool
    over: int  # bytes that are lacking; 0 where it fits or where that isn't known
    refused: str  # what the compiler or a strategy said; "" where it compiled
    memory: dict[str, int]
    count: plan_count.Count | None

    @property
    def seconds(self) -> float:
        """A step takes at least so long; infinite for one that doesn't compile."""
        if self.count is None:
            return math.inf
        part = self.count.seconds
        serial = part["products"] + part["memory"] + part["exposed collectives"]
        return max(serial, part["all collectives"])


def strategies(config) -> list[str]:
    """Strategies of context parallelism that every mechanism of a config has."""
    records = [registry.get(registry.parse(text)[0]) for text in config.mixers]
    return [s for s in records[0].context if all(s in record.context for record in records)]


def make(config, target: str, mesh, strategy: str | None = None) -> Planned:
    """Compiles and counts the step that `experiments.train` would run.

    strategy None is the config's, or else each mechanism's own first. Raises ValueError for a
    length that doesn't divide.
    """
    _, source = configs.make_task(config.task, "train")
    example = {name: np.asarray(x) for name, x in source[0].items()}
    first = example.get("inputs", example.get("image"))
    length = math.prod(first.shape[:2] if first.ndim > 1 else first.shape)
    about = dict(strategy=strategy or "", length=length)
    state, batch, update = _step(config, source, example, mesh, strategy)
    try:
        # so that nothing traced takes this process's devices for those of the target
        with _quiet(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            compiled = targets.compile_for(target, update, state, batch)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = next(x for x in str(error).splitlines() if x.strip())
        nothing = dict(fits=False, over=_over(str(error)), refused=line, count=None)
        return Planned(memory=_parts(state, batch), **nothing, **about)
    return _measured(compiled, state, batch, target, mesh, about)


def _step(config, source, example, mesh, strategy):
    """(state, batch, update): shapes with their places, and the jitted step."""
    substitute = placement.context_parallel(mesh, config)
    if strategy is not None:
        substitute = functools.partial(parallel.shard, strategy, mesh=mesh)
    model = learning.make_model(learning.model_description(config, source), parallel=substitute)
    one = {name: x[None] for name, x in example.items()}
    one.setdefault("weights", np.ones(1, np.float32))
    placed = placement.place(config, model, one, mesh)
    batch = {
        name: jax.ShapeDtypeStruct(
            (config.batch_size, *x.shape[1:]),
            x.dtype,
            sharding=NamedSharding(mesh, placement.batch_spec(name, x)),
        )
        for name, x in one.items()
    }
    return placed.target, batch, placed.update


def _measured(compiled, state, batch, target, mesh, about):
    accelerator = accelerators.of_target(target)
    used = compiled.memory_analysis()
    memory = _parts(state, batch) | {
        "temporaries": used.temp_size_in_bytes,
        "code": used.generated_code_size_in_bytes,
    }
    fresh = used.output_size_in_bytes - used.alias_size_in_bytes
    memory["all"] = used.argument_size_in_bytes + memory["temporaries"] + memory["code"] + fresh
    over = 0 if accelerator.refuses else max(0, memory["all"] - int(accelerator.memory))
    tensor, context = mesh.shape["tensor"], mesh.shape["context"]
    islands = [d.process_index if accelerator.network else 0 for d in mesh.devices.flat]
    count = plan_count.count(
        hlo.read(text(compiled)),
        accelerator,
        devices=range(0, context * tensor, tensor),  # those that hold different parts of a sequence
        islands=islands,
    )
    return Planned(fits=not over, over=over, refused="", memory=memory, count=count, **about)


def refused(strategy: str, reason: str) -> Planned:
    """The row of a strategy that can't do what a config asks of it."""
    nothing = dict(length=0, fits=False, over=0, memory={}, count=None)
    return Planned(strategy=strategy, refused=reason, **nothing)


def _parts(state, batch) -> dict[str, int]:
    trees = {"parameters": state["params"], "optimiser": state["opt_state"], "batch": batch}
    return {name: dry_run.bytes_per_device(tree) for name, tree in trees.items()}


def _over(message: str) -> int:
    """Bytes that a TPU's compiler says are lacking; 0 where it doesn't."""
    amount = r"([\d.]+)([KMGT]?)"
    scale = dict(zip(["", *"KMGT"], (2 ** (10 * n) for n in range(5)), strict=True))
    if found := re.search(rf"(?i)exceeded \w+ capacity by {amount}", message):
        return int(float(found[1]) * scale[found[2]])
    if found := re.search(rf"\({amount}i?B?\) exceeds available \w+ \({amount}", message):
        return int(float(found[1]) * scale[found[2]] - float(found[3]) * scale[found[4]])
    return 0


def text(compiled: jax.stages.Compiled) -> str:
    """The program's text with all constants, which `as_text()` leaves out: loops end by them."""
    options = _hlo.HloPrintOptions()
    options.print_large_constants = True
    return compiled.runtime_executable().hlo_modules()[0].to_string(options)


@contextlib.contextmanager
def _quiet():
    """A CUDA compiler without a GPU warns about what it can't ask the GPU."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def at_length(config, length: int):
    """The config with sequences of another length, and as many learned positions.

    Raises ValueError for a task whose length isn't an option.
    """
    _, source = configs.make_task(config.task, "train")
    if not hasattr(source, "length"):
        raise ValueError(f"task {config.task} has no option length: --longest needs one")
    beside = len(source[0]["inputs"]) - source.length
    model = config.model
    if registry.parse_call(model)[1].get("max_length"):
        model = configs.changed(model, max_length=length)
    task = configs.changed(config.task, length=length - beside)
    return dataclasses.replace(config, task=task, model=model)
