"""The page of a comparison: a table with intervals over seeds, and where it came from."""

import pathlib
from collections.abc import Iterator, Mapping

import rich.table

from attnjax.core import registry
from experiments import confidence
from experiments import page as pages
from experiments.comparing import plots


def write(root: pathlib.Path, results: Mapping) -> pathlib.Path:
    """Writes report.html of what `experiments.compare` found, and its pictures; its path."""
    rows = results["rows"]
    drawn = {draw.__name__: draw(rows) for draw in (plots.curves, plots.states, plots.costs)}
    for name, figure in drawn.items():
        figure.savefig(root / f"{name}.png", dpi=120)
    curves, states, costs = map(pages.embedded, drawn.values())
    body = [
        pages.heading(1, f"Mechanisms compared on {results['task']}"),
        *map(pages.paragraph, _settings(results)),
        pages.table(*table(results)),
        *map(pages.paragraph, _remarks(results)),
        pages.figure(curves, "Test metrics during training, a line for each seed."),
        pages.figure(states, "Accuracy against the decode state of one sequence."),
        pages.heading(2, "A training step"),
        pages.table(*_cost_table(rows)),
        pages.figure(costs, "Median time and compiled memory, with equal tokens in a batch."),
        pages.heading(2, "Machine"),
        pages.preformatted(results["machine"]),
    ]
    page = root / "report.html"
    page.write_text(pages.document("attnjax compare", body))
    return page


def for_terminal(results: Mapping) -> rich.table.Table:
    """The table of the page, for rich."""
    head, lines = table(results)
    shown = rich.table.Table()
    for name in head:
        shown.add_column(name, overflow="fold")  # a long mechanism is read whole
    for line in lines:
        shown.add_row(*line)
    return shown


def table(results: Mapping) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(head, lines), the most accurate first, then those that were sooner at the target."""
    head = ("mechanism", "accuracy", "bits an answer", f"updates to {results['target']:.0%}",
            "parameters", "width", "MLP", "state")  # fmt: skip

    def order(row):
        accuracy = confidence.of(row["cells"], "accuracy")
        updates = confidence.of(row["cells"], "updates")
        return (-accuracy[0] if accuracy else 1, updates[0] if updates else float("inf"))

    return head, [tuple(_cells(row)) for row in sorted(results["rows"], key=order)]


def _cells(row) -> Iterator[str]:
    seeds = row["cells"]
    yield row["mechanism"]
    yield _interval(seeds, "accuracy", 3)
    yield _interval(seeds, "bits", 3)
    count = sum(x["updates"] is not None for x in seeds)
    part = "" if count in (0, len(seeds)) else f" ({count} of {len(seeds)} seeds)"
    yield _interval(seeds, "updates", 0) + part
    yield f"{row['parameters']:,}"
    _, options = registry.parse_call(row["model"])
    yield str(options["features"])
    yield str(round(options["mlp_ratio"] * options["features"]))
    yield "-" if row["state_bytes"] is None else f"{row['state_bytes'] / 1024:.1f} KiB"


def _interval(seeds, name, digits) -> str:
    found = confidence.of(seeds, name)
    if found is None:
        return "-"
    mean, half = found
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def _settings(results) -> Iterator[str]:
    seeds = len(results["rows"][0]["cells"])
    yield (
        f"Each model is {results['model']}, with one mechanism in every layer and "
        f"{results['parameters']:,} parameters within {results['tolerance']:.1%}: the width of the "
        "MLPs is chosen so, and the features where that is not enough. All have learned positions."
    )
    yield (
        f"Each is trained with {seeds} seeds for {results['steps']:,} updates of "
        f"{results['batch_size']} examples, AdamW at a peak learning rate of "
        f"{results['learning_rate']:g} for all, or until an evaluation, every "
        f"{results['eval_every']} updates, finds an accuracy of {results['target']}."
    )
    yield (
        f"Always giving the most frequent answer has an accuracy of {results['commonest']:.3f}. "
        "± is half of Student's 95 % confidence interval of the mean over seeds."
    )


def _remarks(results) -> Iterator[str]:
    """What went otherwise than the table's head says."""
    for row in results["rows"]:
        for cell in row["cells"]:
            if cell["failure"]:
                yield f"{row['mechanism']}, seed {cell['seed']}, is not counted: {cell['failure']}"
        for cost in row["costs"]:
            if "failure" in cost:
                yield f"{row['mechanism']} at length {cost['length']}: {cost['failure']}"
    versions = {cell["code"] for row in results["rows"] for cell in row["cells"]}
    if len(versions) > 1:
        yield f"Cells were trained by {len(versions)} versions of the code."


def _cost_table(rows):
    lengths = [cost["length"] for cost in rows[0]["costs"]]
    cell = lambda cost: "-" if "failure" in cost else (
        f"{1e3 * cost['seconds']:.0f} ms, {cost['memory'] / 2**20:.0f} MiB"
    )  # fmt: skip
    head = ("mechanism", *(f"length {length}" for length in lengths))
    return head, [(row["mechanism"], *map(cell, row["costs"])) for row in rows]
