"""Trainings of 50 steps under every strategy of every mechanism that has one:

    python -m tests.experiments.fifty_steps > docs/context_parallel_training.md

Each trains small models on eight emulated devices (data=2, context=4), a language model where it is
causal and a vision transformer, and its loss at each step is compared with that of one device. The
exit code is 1 where one differs by more than 1e-5, relatively. `--only gqa swin` takes a few
mechanisms; all take about an hour on a core. Tests run some on four devices.
"""

import argparse
import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

from attnjax import parallel
from attnjax.core import registry, sharding
from experiments import config as configs
from experiments import evaluation, learning, placement

STEPS, BATCHES = 50, 5  # batches come round again, so that the loss falls within so few steps
BOUND = 1e-5
RATES = 5e-4, 5e-5, 5e-6  # of learning: the first at which a rounding doesn't hide what is asked
LM = configs.Experiment(
    task="mqar(vocab_size=32, length=32, num_pairs=4)",
    model="lm(features=16, depth=2, num_heads=4, mlp_ratio=2)",
    mixers=("gqa(num_kv_heads=2, rotary_base=10000.0)", "lightning_attention_2"),
    batch_size=4,
    learning_rate=3e-3,
    steps=STEPS,
    warmup_steps=5,
    mesh=configs.Mesh(data=1, context=4),
)
VIT = dataclasses.replace(
    LM,
    task="digits",
    model="vit(features=16, depth=1, num_heads=2, mlp_ratio=2, patch=1)",
    mixers=("gna(window=(3, 3))",),
)
_ORDERS = {
    "ring": ("ring", "ring(order='zigzag')", "ring(order='striped')"),
    "gather": ("gather", "gather(order='zigzag')"),
}
_HEAD = f"""# Training with the sequence sharded

Written by `python -m tests.experiments.fifty_steps`; do not edit.

Every mechanism that has strategies of [context parallelism](context_parallelism.md), under each of
them, in small models: {STEPS} steps of AdamW on eight emulated devices (`--mesh.data 2
--mesh.context 4`) and on one, from the same parameters. *Difference* is the largest of all {STEPS}
steps, relative to the loss of one device; at most {BOUND:g} is asked for. *A rounding* is what
becomes there of every second parameter changed in its last bit before the first step. Where that is
more than {BOUND:g}, training is chaotic, and no two programs agree: learning is slower there, a
tenth or a hundredth.

| mechanism | model | strategy | learning rate | loss at first | at last | a rounding | difference |
|---|---|---|---|---|---|---|---|"""
_TERMINAL = rich.console.Console(stderr=True)


def prepare(config, mesh):
    """(the training step in its place, batches)."""
    _, source = configs.make_task(config.task, "train")
    batches = evaluation.padded_batches(source, config.batch_size, BATCHES * config.batch_size)
    batches = list(batches)
    parallel = placement.context_parallel(mesh, config)
    model = learning.make_model(learning.model_description(config, source), parallel=parallel)
    return placement.place(config, model, batches[0], mesh), batches


def losses(placed, state, batches):
    """The loss at each step."""
    measured = []
    for step in range(STEPS):
        state, metrics = placed.update(state, placed.put(batches[step % BATCHES]))
        measured.append(metrics["loss"])
    return np.array(jax.device_get(measured))


@functools.lru_cache(maxsize=2)
def on_one_device(config):
    """(what makes a state before the first step, losses, those from rounded parameters)."""
    placed, batches = prepare(config, sharding.make_mesh(devices=jax.devices()[:1]))
    rounded = lambda state: state | dict(params=jax.tree.map(_round, state["params"]))
    from_state = lambda state: losses(placed, state, batches)
    return placed.init, from_state(placed.init()), from_state(rounded(placed.init()))


@functools.lru_cache(maxsize=2)
def calm(config):
    """The config with the first of RATES that isn't chaotic; the last where there is none."""
    for rate in RATES:
        config = dataclasses.replace(config, learning_rate=rate)
        _, expected, rounded = on_one_device(config)
        if difference(rounded, expected) <= BOUND:
            break
    return config


def _round(x):
    """A parameter with every second number changed in its last bit."""
    return jnp.where(jnp.arange(x.size).reshape(x.shape) % 2 == 0, jnp.nextafter(x, 2 * x), x)


def on_several(config, init):
    """Losses from the state that `init` makes."""
    placed, batches = prepare(config, placement.make_mesh(config))
    places = jax.tree.map(lambda x: x.sharding, placed.target)
    return losses(placed, jax.device_put(init(), places), batches)


def difference(actual, expected) -> float:
    """The largest, relative to `expected`; infinite where a loss is no number."""
    found = np.abs(actual / expected - 1).max()
    return float(found) if np.isfinite(found) else np.inf


def models(name: str) -> list[configs.Experiment]:
    """Small models around a mechanism, of the kinds that it fits."""
    record = registry.get(name)
    options = dict(record.small)
    sizes = f"features=48, depth=2, num_heads={options.get('num_heads', 4)}, mlp_ratio=1"
    text = ", ".join(f"{key}={value!r}" for key, value in options.items())
    mixers = (f"{name}({text})",)
    mesh = configs.Mesh(data=2, context=4)
    same = dict(mixers=mixers, mesh=mesh)
    lm = dataclasses.replace(LM, model=f"lm({sizes})", **same)
    vit = dataclasses.replace(VIT, model=f"vit({sizes}, patch=1)", **same)
    causal = record.layout == "sequence" and registry.Claim.CAUSAL in record.claims
    return [lm, vit] if causal else [vit]


@dataclasses.dataclass(frozen=True)
class Trained:
    """What several devices made of a training, beside what one device makes of it."""

    rate: float  # of learning
    first: float  # losses of one device
    last: float
    rounded: float  # difference that a rounding of the parameters makes there
    found: float | str  # difference of several devices, or why they refuse

    @property
    def holds(self) -> bool:
        """Whether several devices do what one does."""
        return isinstance(self.found, str) or self.found <= BOUND

    def cells(self):
        """As they stand in the page."""
        found = self.found if isinstance(self.found, str) else f"{self.found:.1e}"
        losses = f"{self.first:.3f}", f"{self.last:.3f}"
        return f"{self.rate:.0e}", *losses, f"{self.rounded:.1e}", found


def train(config: configs.Experiment, strategy: str) -> Trained:
    """One training under a strategy, beside that of one device."""
    alone = calm(dataclasses.replace(config, mesh=configs.Mesh(data=1)))
    init, expected, rounded = on_one_device(alone)
    spread = dict(mesh=config.mesh, strategy=strategy)
    try:
        actual = on_several(dataclasses.replace(alone, **spread), init)
        found = difference(actual, expected)
    except NotImplementedError as error:
        found = f"refused: {error}"
    first, last = (float(x.mean()) for x in (expected[:BATCHES], expected[-BATCHES:]))
    return Trained(alone.learning_rate, first, last, difference(rounded, expected), found)


def main() -> int:
    """Trains all, prints the page; 1 where a loss isn't that of one device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mechanisms, as gqa")
    only = parser.parse_args().only
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
    records = registry.of_kind(registry.Mechanism)
    wanted = set(map(registry.full_name, only)) if only else records
    cases = [
        (name, config, strategy)
        for name, record in records.items()
        if record.context and name in wanted
        for config in models(name)
        for each in parallel.strategies(record)
        for strategy in _ORDERS.get(each, (each,))
    ]
    print(_HEAD)
    hold, before = True, None
    for name, config, strategy in rich.progress.track(cases, console=_TERMINAL):
        if name != before:
            jax.clear_caches()  # a process can't hold the programs of all mechanisms
        before = name
        trained = train(config, strategy)
        hold &= trained.holds
        kind = "LM" if config.task == LM.task else "ViT"
        print(f"| `{name}` | {kind} | `{strategy}` | {' | '.join(trained.cells())} |", flush=True)
    return 0 if hold else 1


if __name__ == "__main__":
    sys.exit(main())
