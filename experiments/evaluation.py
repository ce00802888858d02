"""Metrics of parameters on the test split of a task."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from experiments import config as configs
from experiments import learning


def measure(config, placed, params, most: int | None = None) -> dict[str, float]:
    """Loss, accuracy and, for tokens, bits per token over the test split or `most` of it.

    Examples come in their order; the last batch is filled up with examples of weight 0. Of several
    processes each reads the rows that it holds, and all have the sums over all of them.
    """
    record, source = configs.make_task(config.task, "test")
    totals: dict[str, float] = {}
    for batch in padded_batches(source, config.batch_size, most, rows=placed.rows()):
        sums = placed.sums(params, placed.put(batch))
        totals = {name: totals.get(name, 0.0) + float(x) for name, x in sums.items()}
    return metrics(totals, record.kind)


def metrics(totals: dict[str, float], kind: str) -> dict[str, float]:
    """The metrics of a task's kind from sums over its targets."""
    means = {name: float(x) for name, x in learning.means(totals).items()}
    if kind == "tokens":
        means["bits_per_token"] = means["loss"] / math.log(2)
    return means


def text(measured: dict[str, float]) -> str:
    """Metrics as a person reads them."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in measured.items())


def commonest(config) -> float:
    """Accuracy on the test split of always giving the answer that is most frequent there."""
    _, source = configs.make_task(config.task, "test")
    counts = np.zeros(source.vocab_size)
    for batch in padded_batches(source, config.batch_size, config.eval_examples):
        counts += np.bincount(batch["targets"].ravel(), batch["weights"].ravel(), len(counts))
    return float(counts.max() / counts.sum())


def padded_batches(
    source, size: int, most: int | None = None, *, rows: Sequence[int] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of exactly `size`, with weights that are 0 for what only fills up the last.

    `rows`: those of every batch that are wanted; all where None.
    """
    count = len(source) if most is None else min(most, len(source))
    for start in range(0, count, size):
        places = start + np.asarray(range(size) if rows is None else rows)
        examples = [source[int(min(i, count - 1))] for i in places]
        batch = {name: np.stack([e[name] for e in examples]) for name in examples[0]}
        real = (places < count).astype(np.float32)
        weights = batch.get("weights", np.ones(len(places), np.float32))
        batch["weights"] = weights * real.reshape(-1, *(1,) * (weights.ndim - 1))
        yield batch
