"""A plan as tables, and as data."""

import contextlib
import dataclasses
import sys
import time

import rich.box
import rich.console
import rich.progress
import rich.table

from experiments.planning import accelerators


class Report:
    """Prints what a plan finds: tables to the output, progress beside it."""

    def __init__(self, config, mesh):
        self._config, self._mesh = config, mesh
        self._accelerator = accelerators.of_target(config.target)
        width = None if sys.stdout.isatty() else 1000  # for grep: one line a row, whole
        self._out = rich.console.Console(width=width, markup=False, highlight=False)
        self._progress = rich.console.Console(stderr=True, markup=False, highlight=False)

    @contextlib.contextmanager
    def compiling(self, what: str):
        """Says for how long a compilation has been under way."""
        name = " ".join(part for part in ("compiling", what, "for", self._config.target) if part)
        if not self._progress.is_terminal:
            self._progress.print(name)
        columns = "{task.description}", rich.progress.TimeElapsedColumn()
        bar = rich.progress.Progress(
            rich.progress.SpinnerColumn(),
            *columns,
            console=self._progress,
            disable=not self._progress.is_terminal,
            transient=True,
        )
        start = time.monotonic()
        with bar:
            bar.add_task(name, total=None)
            yield
        self._progress.print(f"{name}: {time.monotonic() - start:.0f} s")

    def say(self, line: str) -> None:
        """A line of progress."""
        self._progress.print(line)

    def show(self, rows) -> None:
        """Every strategy in one table, and the first in detail."""
        config, mesh = self._config, self._mesh
        sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
        self._out.print(
            f"{config.task}, {config.model}, {', '.join(config.mixers)}\n"
            f"{config.target}: {mesh.size} devices; {sizes}; batch {config.batch_size} of "
            f"{rows[0].length:,} tokens; all numbers are those of one device and one step"
        )
        if len(rows) > 1:
            self._ranking(rows)
        for line in _verdict(rows[0], self._accelerator):
            self._out.print(line)
        self._table("memory", "bytes", rows=[(k, size(n)) for k, n in rows[0].memory.items()])
        if rows[0].count is not None:
            self._detail(rows[0].count)

    def _ranking(self, rows):
        sent = lambda row: sum(t.bytes for t in row.count.collectives.values())
        known = lambda row, give: give(row) if row.count else row.refused
        lines = [
            (
                row.strategy or "its own",
                "yes" if row.fits else f"no, {size(row.over)} over" if row.over else "no",
                known(row, lambda row: size(row.memory["all"])),
                known(row, lambda row: size(sent(row))),
                known(row, lambda row: f"{row.seconds:.3g} s"),
            )
            for row in rows
        ]
        self._table("strategy", "fits", "memory", "sent", "at least", rows=lines)

    def _detail(self, count):
        busy = ""
        if count.mean_flops < count.flops:
            share = count.mean_flops / count.flops
            busy = f" on the busiest device, {share:.0%} of that on the mean one"
        traffic = f"{size(count.bytes)} of memory traffic"
        self._out.print(f"{count.flops:.4g} operations{busy}; {traffic}")
        if count.kernel_flops:
            self._out.print(f"{count.kernel_flops:.4g} of the operations as Pallas kernels say")
        for source in count.kernels_without_cost:
            self._out.print(f"not counted, for it doesn't say its cost: kernel {source}")
        for source in count.kernels_in_full:
            self._out.print(f"counted whole, for what it skips depends on data: kernel {source}")
        for source in count.unknown:
            self._out.print(f"counted once, for its runs depend on data: loop {source}")
        self._table(
            "collective", "count", "sent", "overlapped", "sent between hosts",
            rows=[
                (kind, f"{t.count:,.0f}", size(t.bytes), f"{t.overlapped / t.count:.0%}",
                 size(t.between))
                for kind, t in count.collectives.items()
            ],
        )  # fmt: skip
        exposed = [(kind, source, size(n)) for kind, source, n in count.exposed if n]
        self._table("not overlapped", "where", "sent", rows=exposed)
        buffers = [(source, shape, size(n)) for source, shape, n in count.buffers]
        self._table("largest arrays", "shape", "bytes", rows=buffers)

    def show_longest(self, longest) -> None:
        """The longest sequence that fits."""
        if longest is None:
            self._out.print("no length was found that fits")
        else:
            strategy = f" with {longest.strategy}" if longest.strategy else ""
            self._out.print(
                f"longest found to fit{strategy}: {longest.length:,} tokens, "
                f"{size(longest.memory['all'])}"
            )

    def data(self, rows, longest) -> dict:
        """Everything, for JSON."""
        as_data = lambda row: dataclasses.asdict(row) | {"at_least_seconds": _finite(row.seconds)}
        return {
            "config": dataclasses.asdict(self._config),
            "accelerator": dataclasses.asdict(self._accelerator),
            "mesh": dict(self._mesh.shape),
            "plans": [as_data(row) for row in rows],
            "longest": None if longest is None else as_data(longest),
        }

    def _table(self, *header, rows):
        if not rows:
            return
        table = rich.table.Table(box=rich.box.SIMPLE)
        for number, title in enumerate(header):
            text = number == 0 or title in ("where", "shape", "fits")
            table.add_column(title, overflow="fold", justify="left" if text else "right")
        for row in rows:
            table.add_row(*row)
        self._out.print(table)


def _verdict(row, accelerator):
    """Lines: whether it fits, and the lower bound with what it is made of."""
    has = size(accelerator.memory)
    if row.fits:
        yield f"fits: {size(row.memory['all'])} of {has}"
    else:
        lacking = f"{size(row.over)} more than there is" if row.over else "the compiler refuses it"
        yield f"does not fit: {lacking}, {has} a device"
    if row.refused:
        yield row.refused
    if row.count is None:
        return
    part = dict(row.count.seconds)
    everything = part.pop("all collectives")
    bound = max(part, key=part.get)
    if everything > sum(part.values()):
        bound = "all collectives"
    shares = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in part.items())
    loops = len(row.count.unknown)
    given = f", if each of {loops} loops below runs at least once," if loops else ""
    yield (
        f"a step takes{given} at least {row.seconds:.3g} s, mostly bound by {bound} ({shares}; all "
        f"collectives, hidden or not, {everything:.3g} s); it will take longer"
    )


def _finite(number):
    return number if number < float("inf") else None


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            break
        count, unit = count / 1024, "TiB"
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
