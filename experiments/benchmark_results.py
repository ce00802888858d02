"""What a benchmark found: a table for the terminal, JSON to keep, and a plot."""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import statistics


def write(config, results, torch_version, *, ours):
    """The table on the terminal, the JSON file config.out, and the plot beside it.

    results: {case: {implementation: [seconds]}}; ratios are to the implementation `ours`.
    """
    rows = [
        {
            **dataclasses.asdict(case),
            "median_seconds": (medians := {n: statistics.median(x) for n, x in times.items()}),
            "times_ours": {name: x / medians[ours] for name, x in medians.items()},
            "runs": len(times[ours]),
        }
        for case, times in results.items()
    ]
    show(results, rows)
    settings = {name: value for name, value in vars(config).items() if "torch_python" not in name}
    page = {
        "machine": machine(),
        "versions": versions() | {"torch": torch_version},
        "config": settings | {"out": config.out.name, "dtype": "float32", "batch": 1},
        "cases": rows,
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(page, indent=1) + "\n")
    plot(rows, config.out.with_suffix(".png"), ours)
    print(f"wrote {config.out} and {config.out.with_suffix('.png').name}")


def machine():
    """What the numbers hold for."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    models = [x.partition(":")[2].strip() for x in text.splitlines() if x.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
    }


def versions():
    """Of Python and the libraries that decide about speed."""
    names = ("jax", "jaxlib", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}


def show(results, rows):
    """A line for each case: milliseconds, and how many times ours that is."""
    import rich.console
    import rich.table

    names = list(dict.fromkeys(name for row in rows for name in row["median_seconds"]))
    table = rich.table.Table("case", *names, title="median milliseconds (times ours)")
    for case, row in zip(results, rows, strict=True):
        cells = [
            f"{1e3 * row['median_seconds'][name]:.1f} ({row['times_ours'][name]:.2f})"
            if name in row["median_seconds"]
            else "-"
            for name in names
        ]
        table.add_row(str(case), *cells)
    rich.console.Console(soft_wrap=True).print(table)


def plot(rows, path, ours):
    """Ratios of times over the length: a panel for each mask, forward and with gradients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    names = [name for name in rows[0]["times_ours"] if name != ours]
    head_dims = sorted({row["head_dim"] for row in rows})
    styles = zip(itertools.cycle(("-", "--", ":")), head_dims, strict=False)
    lines = list(itertools.product(enumerate(names), styles))
    ways = itertools.product((False, True), repeat=2)
    for axes, (backward, causal) in zip(panels.flat, ways, strict=True):
        here = [row for row in rows if (row["backward"], row["causal"]) == (backward, causal)]
        for (color, name), (style, head_dim) in lines:
            of_line = [x for x in here if x["head_dim"] == head_dim and name in x["times_ours"]]
            points = [x["length"] for x in of_line], [x["times_ours"][name] for x in of_line]
            label = f"{name}, D {head_dim}"
            axes.plot(*points, style, color=f"C{color}", marker="o", ms=3, label=label)
        axes.axhline(1, color="gray", lw=0.8)
        mask, way = "causal" if causal else "full", "forward + backward" if backward else "forward"
        axes.set(title=f"{mask}, {way}", xscale="log", yscale="log")
        axes.set_xticks([row["length"] for row in here], [str(row["length"]) for row in here])
        axes.minorticks_off()
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.supxlabel("length")
    figure.supylabel(f"time / time of {ours}")
    figure.savefig(path, dpi=130)
