"""What a benchmark found: a table for the terminal, JSON to keep, and a plot."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess

import jax

_DRIVER = "driver_version", "clocks.max.sm", "power.limit"  # what nvidia-smi is asked for


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
    """Of Python and the libraries that decide about speed, of those that are installed."""
    found = {
        x.name.lower().replace("_", "-"): x.version for x in importlib.metadata.distributions()
    }
    names = ("jax", "jaxlib", "numpy", "libtpu", "tokamax")
    kept = {
        name: version
        for name, version in sorted(found.items())
        if name in names or name.startswith(("jax-cuda", "nvidia-cudnn"))
    }
    return {"python": platform.python_version(), **kept}


def device():
    """The accelerator, or "cpu"; of Nvidia's the driver, and its limits of clock and power."""
    first = jax.devices()[0]
    about = {"platform": first.platform, "kind": first.device_kind, "count": jax.device_count()}
    if first.platform == "gpu" and shutil.which("nvidia-smi"):
        ask = ["nvidia-smi", f"--query-gpu={','.join(_DRIVER)}", "--format=csv,noheader"]
        text = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
        about |= dict(zip(_DRIVER, text.splitlines()[0].split(", "), strict=True))
    return about


def circumstances():
    """All of them, with the date and how busy the machine is."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "load": os.getloadavg(),
        "device": device(),
        "versions": versions(),
    }


def row(case: dict, times: dict, refused: dict, work: dict, *, ours: str) -> dict:
    """What is kept of a case: medians, rates of work, and times as multiples of the one of ours."""
    medians = {name: statistics.median(x) for name, x in times.items()}
    return {
        **case,
        "median_seconds": medians,
        "rate": {name: work[name] / x for name, x in medians.items()},
        "times_ours": {n: x / medians[ours] for n, x in medians.items()} if ours in medians else {},
        "refused": refused,
        "runs": max(map(len, times.values()), default=0),
    }


def show(page: dict, labels: list[str]):
    """A line for each case: milliseconds, and how many times ours that is; then refusals."""
    import rich.console
    import rich.table

    names = dict.fromkeys(name for row in page["cases"] for name in row["median_seconds"])
    title = f"median milliseconds (times {page['ours']}), {page['device']['kind']}"
    case = rich.table.Column("case", no_wrap=True)
    table = rich.table.Table(case, *names, title=title)
    for label, row in zip(labels, page["cases"], strict=True):
        table.add_row(label, *(_cell(row, name) for name in names))
    console = rich.console.Console()
    if not console.is_terminal:  # a file is as wide as its lines
        console.width = 200
    console.print(table)
    for line in refusals(page["cases"], labels):
        print(line)


def _cell(row, name):
    if name not in row["median_seconds"]:
        return "-"
    text = f"{1e3 * row['median_seconds'][name]:.4g}"
    times = row["times_ours"].get(name)
    return text if times is None else f"{text} ({times:.2f})"


def refusals(rows: list[dict], labels: list[str]) -> list[str]:
    """A line for each implementation and reason, with the cases that it is for."""
    cases = {}
    for label, row in zip(labels, rows, strict=True):
        for name, why in row["refused"].items():
            cases.setdefault((name, why), []).append(label)
    where = lambda found: "everywhere" if len(found) == len(rows) else "; ".join(found)
    return [f"no time of {name} ({where(found)}): {why}" for (name, why), found in cases.items()]


def write(page: dict, labels: list[str], out: pathlib.Path):
    """The JSON file, and the plot beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(page, indent=1) + "\n")
    plot(page, labels, out.with_suffix(".png"))
    print(f"wrote {out} and {out.with_suffix('.png').name}")


def plot(page: dict, labels: list[str], path: pathlib.Path):
    """A line for each case with a point for each implementation: its median time."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(9, 1.5 + 0.25 * len(labels)), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(name for row in page["cases"] for name in row["median_seconds"])
    for color, name in enumerate(names):
        found = [(x["median_seconds"].get(name), i) for i, x in enumerate(page["cases"])]
        points = [(1e3 * seconds, i) for seconds, i in found if seconds is not None]
        axes.plot(*zip(*points, strict=True), "o", color=f"C{color}", ms=4, label=name)
    title = f"{page['benchmark']}, {page['device']['kind']}"
    axes.set(xscale="log", xlabel="milliseconds", title=title)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="y", lw=0.3)
    if names:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130)
