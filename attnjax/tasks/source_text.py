"""Language modelling on bytes: the Python sources of the running interpreter's standard library.

Every Python has this corpus on disk, some 8 MB of it, so nothing is downloaded. The files are
every *.py of the standard library but for tests, programs, tables of data and the settings of the
build; each goes whole to one split by a hash of its relative path, about 90 % to train and
5 % each to validation and test. The files of a split, sorted by path, are joined by the byte 0,
which occurs in none of them, and cut into windows that touch: window i predicts the bytes
i T + 1 .. i T + T from those before, so each byte but the first is predicted once.

Another version of Python is another corpus: compare numbers between equal fingerprints only.
"""

import dataclasses
import functools
import hashlib
import lzma
import pathlib
import sysconfig
from typing import ClassVar

import numpy as np

from attnjax.core import registry
from attnjax.tasks import source

_SPLITS = ("train", "validation", "test")
_SEPARATOR = b"\0"
_SKIPPED_FOLDERS = {
    *("test", "tests", "site-packages", "dist-packages", "__pycache__"),
    *("idlelib", "turtledemo", "lib2to3", "ensurepip"),
    *("encodings", "pydoc_data"),  # tables and generated text
}


@dataclasses.dataclass(frozen=True)
class SourceText(source.Source):
    """{"inputs": int32 [T], "targets": int32 [T], "weights": float32 [T]}, T = `length`.

    Targets are the inputs one byte later and all weights are 1. `seed` says which files go to
    which split. Raises ValueError for an unknown split or where it holds no whole window, and
    FileNotFoundError where the interpreter came without its sources.
    """

    length: int = dataclasses.field(default=256, kw_only=True)
    seed: int = dataclasses.field(default=0, kw_only=True)
    vocab_size: ClassVar[int] = 256

    def __post_init__(self):
        source.check_split(self.split, _SPLITS)
        most = len(self._corpus()) - 1
        if not 1 <= self.length <= most:
            raise ValueError(f"length={self.length} must be in [1, {most}]")

    def __len__(self) -> int:
        return (len(self._corpus()) - 1) // self.length

    def example(self, index: int) -> source.Example:
        start = index * self.length
        window = self._corpus()[start : start + self.length + 1].astype(np.int32)
        weights = np.ones(self.length, np.float32)
        return {"inputs": window[:-1], "targets": window[1:], "weights": weights}

    def fingerprint(self) -> str:
        """SHA-256 over the options, the version and the whole corpus of the split."""
        return source.digest(f"{self!r} version {self.version}", [{"corpus": self._corpus()}])

    def _corpus(self) -> np.ndarray:
        return _corpus(self.split, self.seed)


@functools.cache  # so that a worker process reads it again instead of being sent it
def _corpus(split: str, seed: int) -> np.ndarray:
    """The joined files of a split: uint8 [number of bytes]."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = [root / path for path in _files(root) if _split_of(path, seed) == split]
    if not files:
        raise FileNotFoundError(f"the standard library has no sources in {root}")
    joined = _SEPARATOR.join(path.read_bytes() for path in files)
    return np.frombuffer(joined, np.uint8)


def _files(root: pathlib.Path) -> list[str]:
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (path for path in paths if _SKIPPED_FOLDERS.isdisjoint(path.parts[:-1]))
    return sorted(path.as_posix() for path in kept if not path.name.startswith("_sysconfigdata"))


def _split_of(path: str, seed: int) -> str:
    percent = int.from_bytes(hashlib.sha256(f"{seed}/{path}".encode()).digest()[:8]) % 100
    return "train" if percent < 90 else "validation" if percent < 95 else "test"


def baselines() -> dict[str, float]:
    """Bits per byte of the test split at seed 0.

    "unigram" codes each byte by its frequency in the train split, with one added to every count;
    "lzma" is the general compressor on the test split alone.
    """
    train, test = _corpus("train", 0), _corpus("test", 0)
    counts = np.bincount(train, minlength=256) + 1
    unigram = -np.log2(counts / counts.sum())[test].mean()
    return {
        "unigram_bits_per_byte": float(unigram),
        "lzma_bits_per_byte": 8 * len(lzma.compress(test.tobytes())) / len(test),
    }


SPEC = registry.Task(fn=SourceText, kind="tokens", baselines=baselines)
