"""One line of progress: a bar in a terminal, a line now and then elsewhere."""

import time

import jax
import rich.console
import rich.progress


class Progress:
    """Loss, accuracy, tokens or images a second and the time that is left.

    The first step is said to be compiling, for it takes long. Numbers are means since the last
    `summary`. Of several processes only the first speaks.
    """

    def __init__(self, config, *, done: int, example):
        self._config, self._done, self._start = config, done, None
        self._unit = "images" if "label" in example else "tokens"
        first = example["label"] if "label" in example else example["inputs"]
        self._units = config.batch_size * first[0].size
        self._metrics, self._counted, self._last = [], 0, {}
        quiet = jax.process_index() > 0
        self._console = rich.console.Console(soft_wrap=True, quiet=quiet)
        self._bar = rich.progress.Progress(
            "{task.description}",
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=config.steps, completed=done)

    def __enter__(self) -> "Progress":
        self._bar.start()
        if not self._console.is_terminal:
            self.say("compiling the first step")
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def advance(self, metrics) -> None:
        """One more step with these metrics, on the device."""
        self._done += 1
        if self._start is None:  # speed is that of the steps after the one that compiled
            self._start = time.perf_counter()
        else:
            self._counted += 1
        self._metrics.append(metrics)
        self._bar.advance(self._task)
        if self._done % self._config.log_every == 0:
            means = self.summary(forget=False)
            line = (
                f"loss {means['loss']:.3f}  {means[f'{self._unit}_per_second']:,.0f} {self._unit}/s"
            )
            self._bar.update(self._task, description=line)
            if not self._console.is_terminal and self._done % (10 * self._config.log_every) == 0:
                self.say(f"step {self._done}/{self._config.steps}: {line}")

    def summary(self, *, forget: bool = True) -> dict[str, float]:
        """Means of the metrics since the last summary, and the speed since the first step."""
        names = ("loss", "accuracy", "gradient_norm")
        count = len(self._metrics)
        means = {name: sum(float(m[name]) for m in self._metrics) / count for name in names}
        seconds = time.perf_counter() - self._start
        means[f"{self._unit}_per_second"] = self._counted * self._units / max(seconds, 1e-9)
        if forget:
            self._metrics = []
        return means

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, markup=False)
