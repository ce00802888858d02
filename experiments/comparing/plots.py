"""Pictures of a comparison; each function takes the rows of its results and gives a figure."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from experiments import confidence

_LINES = {"-": "o", "--": "s", ":": "^"}  # a line style, and a marker, for every ten colours

Rows = Sequence[Mapping]


def curves(rows: Rows) -> Figure:
    """Accuracy and bits on the test split over updates: a line for each seed."""
    figure, (accuracy, bits) = _panels(2)
    for axes, name in ((accuracy, "accuracy"), (bits, "bits")):
        for row, style in zip(rows, _styles(rows), strict=True):
            for i, cell in enumerate(row["cells"]):
                points = [(x["step"], x[name]) for x in cell["curve"]]
                label = None if i else row["mechanism"]
                axes.plot(*zip(*points, strict=True), lw=1.2, alpha=0.8, label=label, **style)
    accuracy.set(xlabel="updates", ylabel="test accuracy")
    bits.set(xlabel="updates", ylabel="test bits an answer")
    return _with_legend(figure, accuracy)


def states(rows: Rows) -> Figure:
    """Accuracy, with its interval, over the size of the decode state."""
    figure, (axes,) = _panels(1)
    for row, style in zip(rows, _styles(rows), strict=True):
        found = confidence.of(row["cells"], "accuracy")
        if found is None or row["state_bytes"] is None:
            continue
        mean, half = found
        at = row["state_bytes"] / 1024, mean
        look = dict(fmt=_LINES[style["ls"]], capsize=3, color=style["color"])
        axes.errorbar(*at, half, **look, label=row["mechanism"])
    axes.set(xscale="log", xlabel="KiB of decode state", ylabel="test accuracy", ylim=(0, 1.05))
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis("{x:g}")
    return _with_legend(figure, axes)


def costs(rows: Rows) -> Figure:
    """Milliseconds and MiB of a training step over length."""
    figure, (seconds, memory) = _panels(2)
    panels = (seconds, "seconds", 1e3, "ms a step"), (memory, "memory", 2**-20, "MiB a device")
    for axes, name, factor, label in panels:
        for row, style in zip(rows, _styles(rows), strict=True):
            points = [(x["length"], factor * x[name]) for x in row["costs"] if name in x]
            if points:
                line = dict(marker="o", ms=3, label=row["mechanism"])
                axes.plot(*zip(*points, strict=True), **line, **style)
        axes.set(xscale="log", yscale="log", xlabel="length", ylabel=label)
        lengths = [x["length"] for x in rows[0]["costs"]]
        axes.set_xticks(lengths, map(str, lengths))
        axes.tick_params(which="minor", axis="x", length=0)
    return _with_legend(figure, seconds)


def _panels(count):
    figure = Figure(figsize=(4.5 * count + 2.5, 3.6), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _styles(rows) -> list[dict[str, str]]:
    """As many styles as rows, the same in every picture."""
    lines = list(_LINES)
    return [{"color": f"C{i % 10}", "ls": lines[i // 10 % 3]} for i in range(len(rows))]


def _with_legend(figure, axes) -> Figure:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    return figure
