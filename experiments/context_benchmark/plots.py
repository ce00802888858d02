"""The context-parallel benchmark's rows as pictures."""

import itertools
import math
from typing import Any

import numpy as np

from experiments.context_benchmark import tables

MIB = 2**20
_QUANTITIES = {
    "times_one_device": ("time / one device", lambda row: row.get("times_one_device")),
    "temporaries": ("temporaries of a device, MiB", lambda row: row["temporaries"] / MIB),
    "sent": ("sent by a device, MiB", lambda row: sum(row["sent"].values()) / MIB or None),
    "balance": ("work, busiest / mean device", lambda row: row["balance"]),
}


def by_mask(data: dict[str, Any]):
    """A figure: for each quantity, ways by masks, at the length and scale with most masks."""
    from matplotlib.figure import Figure

    rows = _labelled(_of_most_masks(data["rows"]))
    masks = list(dict.fromkeys(row["mask"] for row in rows))
    panels = _panels(rows)
    columns = 2 if len(masks) > 3 else len(panels)
    lines = math.ceil(len(panels) / columns)
    height = 1 + 0.27 * len({row["way"] for row in rows})
    size = columns * (2.8 + 0.75 * max(len(masks), 2)), lines * height
    figure = Figure(figsize=size, layout="constrained")
    places = figure.subplots(lines, columns, squeeze=False).flat
    for axes, name in itertools.zip_longest(places, panels):
        if name is None:
            axes.axis("off")
        else:
            _heat(axes, name, rows, masks)
    figure.suptitle(_title(data, rows))
    return figure


def by_length(data: dict[str, Any]):
    """A figure: for each quantity, over the length, of the mask with most of them; None for one."""
    from matplotlib.figure import Figure

    rows = _labelled(_of_most_lengths(data["rows"]))
    lengths = sorted({row["length"] for row in rows})
    if len(lengths) < 2:
        return None
    panels = _panels(rows)
    figure = Figure(figsize=(4 * len(panels), 4.6), layout="constrained")
    known = lambda row: any(_value(name, row) is not None for name in panels)
    ways = list(dict.fromkeys(row["way"] for row in rows if known(row)))
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        for number, way in enumerate(ways):
            of_way = sorted((row["length"], _value(name, row)) for row in rows if row["way"] == way
                            and _value(name, row) is not None)  # fmt: skip
            style = ("-", "--", ":")[number // 10 % 3]
            axes.plot(*np.array(of_way).reshape(-1, 2).T, style, color=f"C{number % 10}",
                      marker="o", ms=3, label=way)  # fmt: skip
        scale = "linear" if name == "balance" else "log"
        axes.set(title=_QUANTITIES[name][0], xscale="log", yscale=scale, xlabel="tokens")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=5, frameon=False, fontsize=8)  # fmt: skip
    figure.suptitle(f"{_title(data, rows)}, {rows[0]['mask']}")
    return figure


def _labelled(rows):
    """With the way of each, which names the function where it isn't the first row's."""

    def way(row):
        where = "" if row["strategy"] else "one device, "
        which = "" if row["function"] == rows[0]["function"] else f"{row['function']}, "
        return which + where + tables.how(row)

    return [row | {"way": way(row)} for row in rows]


def _of_most_masks(rows):
    """Of the length that has most masks, and the longest of these; and its largest scale."""
    masks = lambda length: len({row["mask"] for row in rows if row["length"] == length})
    length = max({row["length"] for row in rows}, key=lambda length: (masks(length), length))
    return _largest_scale([row for row in rows if row["length"] == length])


def _of_most_lengths(rows):
    lengths = lambda mask: len({row["length"] for row in rows if row["mask"] == mask})
    mask = max(dict.fromkeys(row["mask"] for row in rows), key=lengths)
    return _largest_scale([row for row in rows if row["mask"] == mask])


def _largest_scale(rows):
    most = max(row["devices"] for row in rows)
    return [row for row in rows if row["devices"] in (1, most)]


def _title(data, rows):
    devices = max(row["devices"] for row in rows)
    lengths = sorted({row["length"] for row in rows})
    where = data["target"] or f"{devices} emulated CPU devices"
    tokens = f", {lengths[0]:,} tokens" if len(lengths) == 1 else ""
    return f"{where}{tokens}, with gradients"


def _panels(rows):
    return [name for name in _QUANTITIES if any(_value(name, row) is not None for row in rows)]


def _value(name, row):
    if "refused" in row or (name == "balance" and row["devices"] == 1):
        return None
    return _QUANTITIES[name][1](row)


def _heat(axes, name, rows, masks):
    """Of the ways that have any value."""
    ways = list(dict.fromkeys(row["way"] for row in rows if _value(name, row) is not None))
    values = np.full((len(ways), len(masks)), np.nan)
    for row in (row for row in rows if row["way"] in ways):
        y, x, value = ways.index(row["way"]), masks.index(row["mask"]), _value(name, row)
        if value is not None:
            values[y, x] = value
            text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            axes.text(x, y, text, ha="center", va="center", fontsize=7)
        elif "refused" in row:
            axes.text(x, y, "refused", ha="center", va="center", fontsize=7, color="gray")
    axes.imshow(np.log(values), aspect="auto", cmap="YlGnBu", alpha=0.6)
    axes.set_xticks(range(len(masks)), masks, fontsize=8)
    axes.set_yticks(range(len(ways)), ways, fontsize=8)
    axes.set_title(_QUANTITIES[name][0], fontsize=10)
