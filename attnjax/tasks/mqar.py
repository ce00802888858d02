"""Multi-query associative recall: key-value pairs first, then every key once more, at a distance.

Paper: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models",
arXiv:2312.04927, section 4 and its public generator.

With P pairs, vocabulary size V and length T, one example is drawn so:

1. P different keys from 1 .. V/2 - 1 and P different values from V/2 .. V - 1, both uniformly.
2. Positions 0 .. 2P - 1 hold key, value, key, value, ...
3. The rest is divided into (T - 2P) / 2 slots of two positions. P different slots are drawn one
   after the other for the keys in their order, slot g = 1, 2, ... with probability proportional
   to g^(power_a - 1) among those left; each key stands at the first position of its slot. So the
   distance of a query from the end of the pairs follows a power law; power_a = 1 is uniform.
4. Every other position holds token 0, or with `random_non_queries` a uniform token from all V.

The target at a query is the value of its key and the weight is 1; elsewhere both are 0.

Unlike the paper: rows are drawn without end instead of 100,000 times. Exposure in updates, not in
epochs, decides whether this task is learnt; few rows are learnt by heart.
"""

import dataclasses

import numpy as np

from attnjax.core import registry
from attnjax.tasks import source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mqar(source.Generated):
    """{"inputs": int32 [T], "targets": int32 [T], "weights": float32 [T]}, T = `length`.

    Raises ValueError where the pairs need more than length / 4 or than vocab_size / 2 - 1 keys.
    """

    vocab_size: int = 8192
    length: int = 64
    num_pairs: int = 4
    power_a: float = 0.01
    random_non_queries: bool = False

    def __post_init__(self):
        super().__post_init__()
        most = min(self.length // 4, self.vocab_size // 2 - 1)
        if not 1 <= self.num_pairs <= most:
            raise ValueError(
                f"num_pairs={self.num_pairs} must be in [1, {most}], for length={self.length} "
                f"and vocab_size={self.vocab_size}"
            )

    def draw(self, rng: np.random.Generator) -> source.Example:
        half, end = self.vocab_size // 2, 2 * self.num_pairs
        keys = 1 + rng.choice(half - 1, self.num_pairs, replace=False)
        values = half + rng.choice(self.vocab_size - half, self.num_pairs, replace=False)
        odds = np.arange(1, (self.length - end) // 2 + 1) ** (self.power_a - 1.0)
        # Of exponential waiting times with these rates, the first come in the order of draws
        # without replacement with these odds.
        slots = np.argsort(rng.standard_exponential(len(odds)) / odds)[: self.num_pairs]
        queries = end + 2 * slots

        fillers = self.vocab_size if self.random_non_queries else 1
        inputs = rng.integers(fillers, size=self.length, dtype=np.int32)
        inputs[0:end:2], inputs[1:end:2], inputs[queries] = keys, values, keys
        targets, weights = np.zeros(self.length, np.int32), np.zeros(self.length, np.float32)
        targets[queries], weights[queries] = values, 1
        return {"inputs": inputs, "targets": targets, "weights": weights}


def baselines() -> dict[str, float]:
    """Accuracy, at the default options, of guessing any of the values that were shown."""
    return {"guess_a_shown_value": 1 / Mqar.num_pairs}


SPEC = registry.Task(fn=Mqar, kind="tokens", papers=("zoology",), baselines=baselines)
