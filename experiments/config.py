"""What an experiment is: one frozen dataclass, every field of which the command line can set.

A task, a model and a mechanism are each one text, a name with options: "mqar(num_pairs=8)",
"vit(depth=4, stem='conv')", "gqa(num_kv_heads=2)". So a command, a config and a card say the same.
"""

import dataclasses
import hashlib
import importlib
import inspect
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax

from attnjax.core import registry

ROOT = pathlib.Path(__file__).parents[1]
_UNIMPORTANT = ("directory", "log_every", "eval_every", "save_every", "keep", "mesh", "parallel",
                "strategy", "cpu_devices", "allow_changes", "dry_run", "coordinator",
                "num_processes", "process_id", "num_workers")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis. data=0 takes what the other axes leave."""

    data: int = 0
    fsdp: int = 1
    context: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A training run."""

    task: str = "digits"
    """Task with its options, as in "mqar(vocab_size=256)"; `attnjax list` names all."""
    model: str = "vit(features=64, depth=2, num_heads=4)"
    """Model with its options: lm or vit."""
    mixers: tuple[str, ...] = ("multi_head_attention",)
    """Mechanisms with their options; layer i takes number i, modulo how many there are."""
    augment: tuple[str, ...] = ()
    """Random changes of training images, as in "Affine(rotation=10)", by attnjax.tasks.augment."""
    directory: str = ""
    """Run directory; runs/<config> where empty. The same command again resumes it."""
    seed: int = 0
    """Of parameters, order of data and augmentation."""
    steps: int = 1000
    """Updates of the parameters."""
    batch_size: int = 64
    """Examples in an update, over all devices."""
    accumulate: int = 1
    """Pieces an update's batch is cut into, to save memory; the gradient is the same."""
    learning_rate: float = 2e-3
    """At its peak, after a linear warm-up; a cosine takes it to a hundredth."""
    warmup_steps: int = 50
    """Steps of the warm-up."""
    weight_decay: float = 0.05
    """Of AdamW, on arrays of two or more axes."""
    clip_norm: float = 1.0
    """Largest norm of a gradient."""
    label_smoothing: float = 0.0
    """In training on images."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 250
    """Steps between evaluations on the test split; the last step is always followed by one."""
    eval_examples: int = 2000
    """Most examples of an evaluation during training; the last one takes all of them."""
    target: float | None = None
    """Test accuracy of an evaluation after which the run ends early."""
    save_every: int = 250
    """Steps between checkpoints."""
    keep: int = 3
    """Checkpoints kept."""
    mesh: Mesh = Mesh()
    """Devices along the axes data, fsdp, context and tensor."""
    strategy: str = ""
    """Of context parallelism with its options, as in "ring(order='zigzag')", for the mechanisms
    that have it; the others, and all where it is empty, take the first that they name."""
    parallel: Literal["jit", "pmap"] = "jit"
    """jit over the mesh, or pmap over data alone."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters stay float32."""
    num_workers: int = 0
    """Processes that make batches."""
    cpu_devices: int = 0
    """Emulate that many devices on a CPU, in each process."""
    coordinator: str = ""
    """host:port of process 0 in a run of several processes, with the next two; or auto, where
    JAX finds all three: under Slurm, Open MPI, Kubernetes and on Cloud TPU."""
    num_processes: int = 1
    """Processes in the run."""
    process_id: int = 0
    """Number of this process, from 0."""
    allow_changes: tuple[str, ...] = ()
    """Fields that may differ from the run that is resumed, as in "config.steps" or "code"."""
    dry_run: bool = False
    """Print shapes, parameters, mesh and memory, and stop."""


def emulate(cpu_devices: int) -> None:
    """So many devices on a CPU, before anything else uses jax; 0 leaves the machine's own."""
    if cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices)


def configs() -> dict[str, tuple[str, Experiment]]:
    """Every file of experiments/configs by name: (its docstring, its CONFIG)."""
    found = {}
    for path in sorted((ROOT / "experiments" / "configs").glob("[a-z]*.py")):
        module = importlib.import_module(f"experiments.configs.{path.stem}")
        found[path.stem] = (inspect.getdoc(module), module.CONFIG)
    return found


def named(name: str) -> Experiment:
    """The config of a file in experiments/configs; ValueError where there is none."""
    choices = configs()
    if name not in choices:
        ending = registry.nearest(name, choices) or f"; there are {', '.join(choices)}"
        raise ValueError(f"no config is called {name!r}{ending}")
    return choices[name][1]


def fingerprint(config: Experiment) -> dict[str, Any]:
    """What of a config decides the numbers of a run: not where it is written or how it is split."""
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in _UNIMPORTANT}


def text(name: str, options: Mapping[str, Any]) -> str:
    """A name with options, as `registry.parse_call` reads them."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})"


def changed(call: str, **options: Any) -> str:
    """A text such as "mqar(num_pairs=8)" with other options, or more of them."""
    name, old = registry.parse_call(call)
    return text(name, old | options)


def code_version() -> str:
    """SHA-256 over the sources that a run executes."""
    sha = hashlib.sha256()
    for folder in ("attnjax", "pallas_kernels", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            sha.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return sha.hexdigest()[:16]


def make_task(text: str, split: str):
    """(task record, source) of a text such as "mqar(num_pairs=8)".

    Raises ValueError naming the nearest task or option where the text doesn't fit.
    """
    name, options = registry.parse(text)
    record = registry.get(name)
    if not isinstance(record, registry.Task):
        raise ValueError(f"{name} is a {type(record).__name__}, not a Task")
    known = set(inspect.signature(record.fn).parameters) - {"split"}
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}{registry.nearest(option, known)}")
    return record, record.fn(split, **options)


def make_augmentations(texts: tuple[str, ...]) -> list:
    """The transforms of attnjax.tasks.augment that the texts name."""
    from attnjax.tasks import augment

    kinds = {name: kind for name, kind in vars(augment).items() if isinstance(kind, type)}
    made = []
    for text in texts:
        name, options = registry.parse_call(text)
        if name not in kinds:
            raise ValueError(f"no augmentation is called {name!r}{registry.nearest(name, kinds)}")
        known = {field.name for field in dataclasses.fields(kinds[name])}
        for option in options:
            if option not in known:
                raise ValueError(
                    f"{name} has no option {option!r}{registry.nearest(option, known)}"
                )
        made.append(kinds[name](**options))
    return made
