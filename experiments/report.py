"""One page of what was trained: a table, curves and attention maps, beside simple baselines."""

import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from attnjax import zoo
from attnjax.core import edit
from experiments import config as configs
from experiments import finished
from experiments import page as pages


def write(root: pathlib.Path, rows: Sequence, baselines: Mapping[str, Mapping[str, float]]):
    """Writes `root`/report.html with its pictures beside it; returns its path.

    rows: name, mechanism, run, metrics, parameters, seconds and memory of each model.
    """
    pictures = root / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    images = [row for row in rows if "bits_per_token" not in row.metrics]
    texts = [row for row in rows if "bits_per_token" in row.metrics]
    body = ["<h1>attnjax: what this machine has learnt</h1>"]
    body += ["<h2>Handwritten digits</h2>", _table(images, baselines["digits"], "accuracy", 4)]
    body += [_figure(_curves(images, "accuracy", pictures), "Test accuracy during training.")]
    for row in images:
        file = _maps(row, root / "zoo", pictures)
        if file is not None:
            body.append(
                _figure(
                    file,
                    f"{row.mechanism}: the attention that each image position "
                    "gets, mean over heads and queries, in each layer.",
                )
            )
    body += ["<h2>Python's own sources, byte by byte</h2>"]
    body += [_table(texts, baselines["source_text"], "bits_per_token", 3)]
    bits = _curves(texts, "bits_per_token", pictures, baselines["source_text"])
    body += [_figure(bits, "Bits per byte on the test files during training.")]
    body += ["<h2>Machine</h2>", pages.preformatted((rows[0].run / "env.txt").read_text())]
    page = root / "report.html"
    page.write_text(pages.document("attnjax report", body))
    return page


def _table(rows, baselines, metric, digits) -> str:
    head = ("mechanism", _label(metric), "parameters", "seconds", "memory of a step")
    number = lambda value: f"{value:.{digits}f}"
    lines = [
        (row.mechanism, number(row.metrics[metric]), f"{row.parameters:,}", f"{row.seconds:.0f}",
         f"{row.memory / 2**20:.1f} MiB")
        for row in rows
    ]  # fmt: skip
    for name, value in baselines.items():
        lines.append((name.replace("_", " "), number(value), "", "", ""))
    return pages.table(head, lines)


def _label(metric) -> str:
    """A metric in words; the tokens of the demo's text are bytes."""
    return metric.replace("bits_per_token", "bits_per_byte").replace("_", " ")


def _figure(file: pathlib.Path, caption: str) -> str:
    return pages.figure(f"{file.parent.name}/{file.name}", caption)


def _curves(rows, metric, pictures, baselines=None) -> pathlib.Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        lines = [x for x in finished.curves(row.run) if f"test_{metric}" in x]
        points = [(x["step"], x[f"test_{metric}"]) for x in lines]
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, label=row.mechanism)
    for name, value in (baselines or {}).items():
        axes.axhline(value, ls=":", color="gray")
        at = dict(transform=axes.get_yaxis_transform(), va="bottom", color="gray", fontsize=8)
        axes.text(0.01, value, name.replace("_", " "), **at)
    axes.set(xlabel="step", ylabel=f"test {_label(metric)}")
    axes.legend(frameon=False)
    file = pictures / f"{metric}.png"
    figure.savefig(file, dpi=130)
    return file


def _maps(row, root, pictures) -> pathlib.Path | None:
    """Where the layers of a ViT look, over some test images; None without an attention matrix."""
    from matplotlib.figure import Figure

    module, params, card = zoo.load(row.name, root=root)
    _, source = configs.make_task(finished.task_text(card), "test")
    images = np.stack([source[i]["image"] for i in range(6)])
    try:
        _, maps = jax.jit(edit.read(module.apply))({"params": params}, images)
    except NotImplementedError:
        return None
    figure = Figure(figsize=(1.3 * len(images), 1.3 * (1 + len(maps))), layout="constrained")
    grid = figure.subplots(1 + len(maps), len(images))
    shown = {"image": images[..., 0]} | {
        f"layer {i + 1}": _as_image(w, images.shape[1:3]) for i, w in enumerate(maps.values())
    }
    for axes, (title, pictures_of) in zip(grid, shown.items(), strict=True):
        axes[0].set_ylabel(title)
        for ax, picture in zip(axes, pictures_of, strict=True):
            ax.imshow(picture, cmap="gray_r" if title == "image" else "magma")
            ax.set(xticks=[], yticks=[])
    file = pictures / f"{row.name.partition('.')[0]}_maps.png"
    figure.savefig(file, dpi=130)
    return file


def _as_image(weights, size):
    """(B N T S) -> (B X Y): the mean over heads and queries of the size of each key's weight."""
    received = np.abs(np.asarray(weights)).mean((1, 2))
    side = round((received.shape[1] * size[0] / size[1]) ** 0.5)
    return received.reshape(len(received), side, -1)
