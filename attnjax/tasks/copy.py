"""Copying: repeat tokens after a delay, from fixed places or from among blanks.

Letters: n = `num_tokens`, L = `length`, V = `vocab_size`; T = L + n. Token 0 is the blank, token 1
asks for an answer, tokens 2 .. V - 1 carry content. One example is drawn so:

1. n content tokens, uniformly and with replacement.
2. They are written in order into the first L positions, blank elsewhere: at 0 .. n - 1 in the
   variant "plain", at n different positions drawn uniformly in "selective".
3. The last n positions hold token 1; their targets are the n content tokens in order, with
   weight 1. All other targets and weights are 0.

"plain" needs only memory of fixed delays, so a fixed convolution solves it; "selective" needs
memory that depends on the content. The pair is the one of Gu and Dao, "Mamba: Linear-Time
Sequence Modeling with Selective State Spaces", arXiv:2312.00752, section 3.1.
"""

import dataclasses
from typing import Literal

import numpy as np

from attnjax.core import registry
from attnjax.tasks import source

_BLANK, _ASK, _FIRST_CONTENT = range(3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy(source.Generated):
    """{"inputs": int32 [T], "targets": int32 [T], "weights": float32 [T]}, T = length + num_tokens.

    Raises ValueError for an unknown variant, more tokens than places or fewer than two contents.
    """

    variant: Literal["plain", "selective"] = "plain"
    vocab_size: int = 18
    length: int = 64
    num_tokens: int = 16

    def __post_init__(self):
        super().__post_init__()
        if self.variant not in ("plain", "selective"):
            raise ValueError(f"variant={self.variant!r} must be 'plain' or 'selective'")
        if self.vocab_size < _FIRST_CONTENT + 2:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least {_FIRST_CONTENT + 2}")
        if not 1 <= self.num_tokens <= self.length:
            raise ValueError(f"num_tokens={self.num_tokens} must be in [1, length={self.length}]")

    def draw(self, rng: np.random.Generator) -> source.Example:
        n = self.num_tokens
        content = rng.integers(_FIRST_CONTENT, self.vocab_size, n)
        places = np.arange(n)
        if self.variant == "selective":
            places = np.sort(rng.choice(self.length, n, replace=False))
        inputs = np.full(self.length + n, _BLANK, np.int32)
        targets, weights = np.zeros_like(inputs), np.zeros(inputs.shape, np.float32)
        inputs[places], inputs[-n:] = content, _ASK
        targets[-n:], weights[-n:] = content, 1
        return {"inputs": inputs, "targets": targets, "weights": weights}


def baselines() -> dict[str, float]:
    """Accuracy, at the default options, of guessing any content."""
    return {"guess": 1 / (Copy.vocab_size - _FIRST_CONTENT)}


SPEC = registry.Task(fn=Copy, kind="tokens", baselines=baselines)
