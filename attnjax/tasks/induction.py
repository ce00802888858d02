"""Induction: after the trigger comes what came after it the first time.

With length T and vocabulary size V, token 0 is the trigger. One example is drawn so:

1. T tokens uniformly from 1 .. V - 1.
2. The trigger overwrites position p, uniform in 0 .. T - 3, and the last position, T - 1.
3. The target at the last position is the token at p + 1, with weight 1; all others are 0.

One attention layer over single tokens cannot do it, as a token does not know what stands before
it; two layers can: the first tells every token its predecessor, the second looks for the trigger
there. Known from Olsson et al., "In-context Learning and Induction Heads", arXiv:2209.11895, and
in this form, with one trigger, from the state-space literature (H3, arXiv:2212.14052).
"""

import dataclasses

import numpy as np

from attnjax.core import registry
from attnjax.tasks import source

_TRIGGER = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Induction(source.Generated):
    """{"inputs": int32 [T], "targets": int32 [T], "weights": float32 [T]}, T = `length`.

    Raises ValueError where the length or the vocabulary is too small for a question.
    """

    vocab_size: int = 16
    length: int = 64

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("vocab_size", 3), ("length", 3)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    def draw(self, rng: np.random.Generator) -> source.Example:
        inputs = rng.integers(_TRIGGER + 1, self.vocab_size, self.length, dtype=np.int32)
        first = rng.integers(self.length - 2)
        inputs[[first, -1]] = _TRIGGER
        targets, weights = np.zeros_like(inputs), np.zeros(inputs.shape, np.float32)
        targets[-1], weights[-1] = inputs[first + 1], 1
        return {"inputs": inputs, "targets": targets, "weights": weights}


def baselines() -> dict[str, float]:
    """Accuracy, at the default options, of guessing any token but the trigger."""
    return {"guess": 1 / (Induction.vocab_size - 1)}


SPEC = registry.Task(fn=Induction, kind="tokens", baselines=baselines)
