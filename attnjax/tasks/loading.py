"""Batches in a fixed order, dealt out to hosts, that can be stopped and resumed at any batch.

The order is a function of the source, the seed, the batch size and the number of hosts, and of
nothing else: not of worker processes, threads or earlier interruptions. A position in it is the
number of batches taken. It is kept together with everything that decides the order, so that going
on with other data is an error and not a silent change of the experiment.
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
    shard_index: int = 0,
    shard_count: int = 1,
    num_workers: int = 0,
    drop_remainder: bool = True,
    transforms: Sequence[Transform] = (),
) -> "Loader":
    """Batches of `batch_size` examples of `source` for host `shard_index` of `shard_count`.

    Each epoch is shuffled anew, changed by `transforms`, dealt out to the hosts in turn and
    stacked. With `drop_remainder` every batch is full and every host gets as many; without it
    every example comes once an epoch, and the last batch may be smaller. `num_epochs=None` never
    ends. A transform's randomness comes from `seed` and the place of the example in the run, so
    an image is changed otherwise in each epoch. Batches are made by `num_workers` processes
    (started by spawn, so a script needs its main guard), or with 0 by a thread of this one.

    Raises ValueError where a number is out of range, a host would get no full batch, or the
    `repr` of a transform does not tell its options.
    """
    n = len(source)
    whole = n - n % max(shard_count, 1) if drop_remainder else n
    _check_range("shard_count", shard_count, 1, n)
    _check_range("shard_index", shard_index, 0, shard_count - 1)
    _check_range("batch_size", batch_size, 1, whole // shard_count if drop_remainder else None)
    _check_range("seed", seed, 0, 2**32 - 1)
    _check_range("num_workers", num_workers, 0, None)
    dataset = grain.MapDataset.source(source).seed(seed)
    dataset = dataset.shuffle() if shuffle else dataset
    for transform in transforms:
        dataset = _transformed(dataset, transform)
    dataset = dataset[shard_index:whole:shard_count]
    dataset = dataset.batch(batch_size, drop_remainder=drop_remainder)
    fingerprint = {
        "source": repr(source),
        "source_fingerprint": source.fingerprint(),
        "seed": seed,
        "batch_size": batch_size,
        "shuffle": shuffle,
        "shard_count": shard_count,
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
        """The position as JSON. It may be set on any host and with any number of workers."""
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


def _check_range(name: str, value: int, least: int, most: int | None) -> None:
    if value < least or (most is not None and value > most):
        limit = f"at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name}={value} must be {limit}")
