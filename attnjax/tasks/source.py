"""What every task gives: a fixed sequence of examples with random access, and its fingerprint."""

import abc
import dataclasses
import hashlib
import operator
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, SupportsIndex

import numpy as np

Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source(abc.ABC):
    """A sequence of examples, each a dict of NumPy arrays; `source[i]` is the same at any time.

    A subclass is a frozen dataclass whose fields are its options, so that its `repr` says what
    it holds and is the same in every process.
    """

    split: str
    version: ClassVar[int] = 1  # raised when the same options begin to mean other examples
    probes: ClassVar[int] = 16  # how many examples, evenly spaced, the fingerprint looks at

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def example(self, index: int) -> Example:
        """Example `index`, which is in [0, len(self))."""

    def __getitem__(self, index: SupportsIndex) -> Example:
        """The example at `index`; IndexError outside [0, len(self))."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"{index=} must be in [0, {len(self)})")
        return self.example(index)

    def fingerprint(self) -> str:
        """SHA-256 over the options, the version and some of the examples themselves.

        The examples are there because a library that draws or decodes them may change as well.
        """
        n = len(self)
        probes = [i * n // self.probes for i in range(self.probes)] if n > self.probes else range(n)
        return digest(f"{self!r} version {self.version}", (self[i] for i in probes))


@dataclasses.dataclass(frozen=True)
class Generated(Source):
    """Examples drawn on demand, each from a random stream of its own.

    Example i of a split reads the Philox stream with key (seed, split) from counter (0, 0, 0, i),
    2^192 blocks away from example i + 1: streams never overlap, so splits share none, and nothing
    depends on what was drawn before. The split train holds 2^31 examples, fresh rows for any
    run; validation and test hold 3,000 each.
    """

    seed: int = dataclasses.field(default=0, kw_only=True)
    sizes: ClassVar[dict[str, int]] = {"train": 2**31, "validation": 3000, "test": 3000}

    def __post_init__(self):
        check_split(self.split, self.sizes)
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} must be in [0, 2^64)")

    def __len__(self) -> int:
        return self.sizes[self.split]

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator) -> Example:
        """One example from the random stream `rng`."""

    def example(self, index: int) -> Example:
        key = np.array([self.seed, list(self.sizes).index(self.split)], np.uint64)
        counter = np.array([0, 0, 0, index], np.uint64)
        return self.draw(np.random.Generator(np.random.Philox(key=key, counter=counter)))


@dataclasses.dataclass(frozen=True)
class Images(Source):
    """Labelled images read from `records`, a random-access sequence as TFDS gives.

    {"image": float32 [X Y D] in [0, 1], "label": int32 scalar}. Integer pixels are divided by
    255. `name` says which data set, configuration and version the records are of.
    """

    name: str = dataclasses.field(kw_only=True)
    num_classes: int = dataclasses.field(kw_only=True)
    records: Sequence[Any] = dataclasses.field(kw_only=True, repr=False, compare=False)
    probes: ClassVar[int] = 2048

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int) -> Example:
        record = self.records[index]
        scale = 255 if np.issubdtype(record["image"].dtype, np.integer) else 1
        image = np.asarray(record["image"], np.float32) / np.float32(scale)
        return {"image": image, "label": np.asarray(record["label"], np.int32)}


def digest(text: str, examples: Iterable[Example] = ()) -> str:
    """SHA-256, in hexadecimal, of a text and of every array's name, dtype, shape and bytes."""
    sha = hashlib.sha256(text.encode())
    for example in examples:
        for name, array in sorted(example.items()):
            array = np.ascontiguousarray(array)
            sha.update(f"{name} {array.dtype} {array.shape}".encode())
            sha.update(array.tobytes())
    return sha.hexdigest()


def check_split(split: str, splits: Iterable[str]) -> None:
    """ValueError if there is no such split."""
    if split not in splits:
        raise ValueError(f"{split=} must be one of {', '.join(splits)}")


def cache_dir() -> pathlib.Path:
    """Where prepared data is kept: $ATTNJAX_DATA, else attnjax in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("ATTNJAX_DATA") or pathlib.Path(user_cache) / "attnjax")
