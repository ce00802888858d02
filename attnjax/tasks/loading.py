"""Batches in a fixed order, each host reading its rows of them, that can be stopped and resumed.

The order is a function of the source, the seed and the batch size, and of nothing else: not of the
number of hosts, worker processes, threads or earlier interruptions. A position in it is the number
of batches taken. It is kept together with everything that decides the order, so that going on with
other data is an error and not a silent change of the experiment, and going on with another number
of hosts is no change at all.
"""

import dataclasses
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from attnjax.tasks import source as sources

Batch = dict[str, np.ndarray]
Transform = grain.transforms.Map | grain.transforms.RandomMap


def loader(
    source: sources.Source,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    num_epochs: int | None = None,
    rows: Sequence[int] | None = None,
    num_workers: int = 0,
    drop_remainder: bool = True,
    transforms: Sequence[Transform] = (),
) -> "Loader":
    """Batches of `batch_size` examples of `source`, of each of which this host reads its `rows`.

    `rows=None` is all of them. Each epoch is shuffled anew, changed by `transforms`, cut into
    batches and stacked. With `drop_remainder` every batch is full; without it every example comes
    once an epoch, and the last batch may be smaller. `num_epochs=None` never ends. A transform's
    randomness comes from `seed` and the place of the example in the run, so an image is changed
    otherwise in each epoch. Batches are made by `num_workers` processes (started by spawn, so a
    script needs its main guard), or with 0 by a thread of this one.

    Raises ValueError where a number is out of range, `rows` are no ascending rows of a full batch,
    or the `repr` of a transform does not tell its options.
    """
    n = len(source)
    _check_range("batch_size", batch_size, 1, n if drop_remainder else None)
    _check_range("seed", seed, 0, 2**32 - 1)
    _check_range("num_workers", num_workers, 0, None)
    dataset = grain.MapDataset.source(source).seed(seed)
    dataset = dataset.shuffle() if shuffle else dataset
    for transform in transforms:
        dataset = _transformed(dataset, transform)
    if rows is not None:
        _check_rows(rows, batch_size, drop_remainder)
        dataset = _Rows(dataset, batch_size, tuple(rows))
    held = batch_size if rows is None else len(rows)
    dataset = dataset.batch(held, drop_remainder=drop_remainder)
    fingerprint = {
        "source": repr(source),
        "source_fingerprint": source.fingerprint(),
        "seed": seed,
        "batch_size": batch_size,
        "shuffle": shuffle,
        "drop_remainder": drop_remainder,
        "transforms": [repr(transform) for transform in transforms],
    }
    return Loader(dataset.repeat(num_epochs), len(dataset), num_workers, fingerprint)


@dataclasses.dataclass(frozen=True)
class Loader:
    """What `loader` gives: every `iter` of it starts at the first batch."""

    dataset: grain.MapDataset  # of batches, any of which can be had by its number
    batches_per_epoch: int
    num_workers: int
    _fingerprint: dict[str, Any]

    def __iter__(self) -> "Batches":
        return Batches(self)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the order of the data, as JSON. The same for all hosts."""
        return dict(self._fingerprint)

    def stream(self, first: int) -> grain.DatasetIterator:
        """grain's iterator over the batches from number `first` on."""
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        stream = self.dataset[first:].to_iter_dataset(ahead)
        return iter(_in_processes(stream, self.num_workers) if self.num_workers else stream)


class Batches(Iterator[Batch]):
    """Iterator over a loader's batches with a position that can be kept and set."""

    def __init__(self, loader: Loader):
        self._loader = loader
        self._next = 0
        self._streams = []  # at most one, started when first needed at the position of then
        # At exit too, as grain's processes must end before its modules are gone.
        weakref.finalize(self, _close_all, self._streams)

    def __next__(self) -> Batch:
        if not self._streams:
            self._streams.append(self._loader.stream(self._next))
        batch = next(self._streams[0])
        self._next += 1
        return batch

    def peek(self) -> Batch:
        """The batch that comes next, which stays next; StopIteration after the last."""
        if self._next == len(self._loader.dataset):
            raise StopIteration
        return self._loader.dataset[self._next]

    def get_state(self) -> dict[str, Any]:
        """The position as JSON, for any host, any number of hosts and any number of workers."""
        return {"next_batch": self._next, "fingerprint": self._loader.fingerprint()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to the position `state`; ValueError, naming what differs, if it is of other data."""
        kept, ours = state["fingerprint"], self._loader.fingerprint()
        changes = [
            f"{name} was {kept.get(name)!r} and is {ours.get(name)!r}"
            for name in ours | kept
            if kept.get(name) != ours.get(name)
        ]
        if changes:
            raise ValueError(f"the position is one in other data: {'; '.join(changes)}")
        _check_range("next_batch", state["next_batch"], 0, len(self._loader.dataset))
        self.close()
        self._next = state["next_batch"]

    def close(self) -> None:
        """Ends threads and processes; they start again with the next batch."""
        _close_all(self._streams)


class _Rows(grain.MapDataset):
    """Of every `size` examples those at `rows`; examples that fill no batch are left out."""

    def __init__(self, examples: grain.MapDataset, size: int, rows: tuple[int, ...]):
        super().__init__(examples)
        self._examples, self._size, self._rows = examples, size, rows

    def __len__(self) -> int:
        return len(self._examples) // self._size * len(self._rows)

    def __getitem__(self, index: int):
        epoch, place = divmod(index, len(self))
        batch, row = divmod(place, len(self._rows))
        first = epoch * len(self._examples) + batch * self._size
        return self._examples[first + self._rows[row]]


def batch_hash(batch: Batch) -> str:
    """SHA-256 of a batch: equal for equal names, dtypes, shapes and values."""
    return sources.digest("", [batch])


def _close_all(streams: list[grain.DatasetIterator]) -> None:
    while streams:
        streams.pop().close()


def _in_processes(stream: grain.IterDataset, num_workers: int) -> grain.IterDataset:
    if not flags.FLAGS.is_parsed():  # only absl's own programs parse the flags grain 0.2.18 reads
        flags.FLAGS.mark_as_parsed()
    # Batches come through pipes: shared memory is small in containers, and grain 0.2.18 now and
    # then leaves some behind when a stream ends.
    pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    stream = grain.experimental.WithOptionsIterDataset(stream, pipes)
    return stream.mp_prefetch(grain.MultiprocessingOptions(num_workers))


def _transformed(dataset: grain.MapDataset, transform: Transform) -> grain.MapDataset:
    if " at 0x" in repr(transform):
        raise ValueError(f"{transform=} must have a repr that tells its options")
    if isinstance(transform, grain.transforms.RandomMap):
        return dataset.random_map(transform)
    return dataset.map(transform)


def _check_rows(rows: Sequence[int], batch_size: int, drop_remainder: bool) -> None:
    if not drop_remainder:
        raise ValueError("rows of a batch need drop_remainder=True: the last may have fewer")
    if not rows or list(rows) != sorted(set(rows)) or rows[0] < 0 or rows[-1] >= batch_size:
        raise ValueError(f"{rows=} must ascend in [0, {batch_size - 1}]")


def _check_range(name: str, value: int, least: int, most: int | None) -> None:
    if value < least or (most is not None and value > most):
        limit = f"at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name}={value} must be {limit}")
