"""See attnjax work on this machine, in minutes: `make demo`.

Trains ViTs with three mechanisms of different families on handwritten digits, and a small language
model on Python's own sources with its sequence sharded over four emulated devices; keeps them in a
zoo, loads them again, measures them, and writes a report page.
"""

import dataclasses
import functools
import pathlib
import shutil
import sys
import time

from experiments import config as configs

DEVICES = 4
VITS = {
    "multi_head_attention": "vit_mha-tiny.digits-demo@1",
    "gna(window=(5, 5))": "vit_gna-tiny.digits-demo@1",
    "lightning_attention_2": "vit_lightning-tiny.digits-demo@1",
}
LM = "lm_mha-tiny.source_text-demo@1"


@dataclasses.dataclass(frozen=True)
class Demo:
    """Trains, keeps, reloads and reports. The same command again goes on where it stopped."""

    directory: str = "runs/demo"
    """Everything is written here."""
    fresh: bool = False
    """Forget an earlier demo in that directory."""
    digits_steps: int = 600
    """Steps of each ViT."""
    text_steps: int = 240
    """Steps of the language model."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One trained model of the report."""

    name: str
    mechanism: str
    run: pathlib.Path
    metrics: dict[str, float]
    parameters: int
    seconds: float  # this process spent on training it; 0 where it was finished before
    memory: int  # bytes of temporaries and arguments of one step, as compiled


def main(argv=None) -> int:
    """The whole demonstration; returns the exit code."""
    import tyro

    demo = tyro.cli(Demo, prog="make demo", args=sys.argv[1:] if argv is None else argv)
    root = pathlib.Path(demo.directory)
    if demo.fresh:
        shutil.rmtree(root, ignore_errors=True)
    known = configs.configs()
    vit = functools.partial(
        dataclasses.replace, known["digits"][1], steps=demo.digits_steps, cpu_devices=DEVICES
    )
    rows = []
    for mechanism, name in VITS.items():
        rows.append(_train(root, name, vit(mixers=(mechanism,), mesh=configs.Mesh(data=DEVICES))))
    lm = dataclasses.replace(
        known["source_text"][1],
        steps=demo.text_steps,
        cpu_devices=DEVICES,
        mesh=configs.Mesh(data=1, context=DEVICES),
    )
    rows.append(_train(root, LM, lm))

    from experiments import report

    baselines = _baselines()
    page = report.write(root, rows, baselines)
    _summary(rows, baselines)
    print(f"\nreport: {page.resolve()}")
    return 0


def _train(root: pathlib.Path, name: str, config) -> Row:
    """Trains one model, keeps it in the zoo, loads it from there and measures it."""
    from experiments import train

    (mechanism,) = config.mixers
    often = max(1, config.steps // 4)  # points of the report's curves
    config = dataclasses.replace(config, directory=str(root / name), eval_every=often)
    print(f"\n{name}: {config.model} with {mechanism} on {config.task}")
    start = time.perf_counter()
    if train.train(config) != 0:
        raise SystemExit(1)
    seconds = time.perf_counter() - start

    from attnjax import zoo
    from experiments import finished, memory

    card = finished.publish(name, [config.directory], root=root / "zoo", command="make demo")
    module, params, card = zoo.load(name, root=root / "zoo")
    metrics = finished.measure(config.task, module, params)
    used = memory.of_a_step(config)
    return Row(name, mechanism, root / name, metrics, card.parameters, seconds, used)


def _baselines() -> dict[str, dict[str, float]]:
    from attnjax.core import registry

    return {task: registry.get(task).baselines() for task in ("digits", "source_text")}


def _summary(rows, baselines) -> None:
    import rich.console
    import rich.table

    table = rich.table.Table("model", "result", "parameters", "seconds")
    for row in rows:
        value = row.metrics.get("bits_per_token")
        result = f"{row.metrics['accuracy']:.4f} accuracy" if value is None else (
            f"{value:.3f} bits per byte"
        )  # fmt: skip
        table.add_row(row.mechanism, result, f"{row.parameters:,}", f"{row.seconds:.0f}")
    for name, value in baselines["digits"].items():
        table.add_row(name.replace("_", " "), f"{value:.4f} accuracy", "", "")
    for name, value in baselines["source_text"].items():
        table.add_row(name.replace("_", " "), f"{value:.3f}", "", "")
    rich.console.Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
