"""ListOps: the value of a nested expression such as [MAX 2 9 [MIN 4 7 ] 0 ], one digit of ten.

Nangia and Bowman, "ListOps: A Diagnostic Dataset for Latent Tree Learning", arXiv:1804.06028, in
the form of Tay et al., "Long Range Arena", arXiv:2011.04006, section 2.2.1.

With A = `max_args`, one example is drawn so:

1. An expression is an operator with 2 .. A arguments. An argument is a digit with probability 3/4,
   always so at depth `max_depth`, else an expression. All choices are uniform.
2. MIN and MAX are as they say, MED is the median rounded down, SM the sum modulo 10.
3. Expressions shorter than `min_length` or longer than `length` tokens are drawn again. An
   operator with its opening bracket is one token, and so is a closing bracket.
4. The expression begins at position 0; the blank, token 0, fills up the rest. The target at its
   last token is the value as a digit's token, with weight 1; all other targets and weights are 0.

The values are not equally frequent: MIN and MAX favour 0 and 9.

Unlike the papers: rows are drawn without end instead of 96,000 times, and a causal language model
reads the answer out, where Long Range Arena classifies a pooled encoding.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from attnjax.core import registry
from attnjax.tasks import source

OPERATORS = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: int(statistics.median(values)),
    "SM": lambda values: sum(values) % 10,
}
BLANK, DIGIT, OPERATOR, CLOSE = 0, 1, 11, 15  # the first token of each kind
_TRIES = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class LraListops(source.Generated):
    """{"inputs": int32 [T], "targets": int32 [T], "weights": float32 [T]}, T = `length`.

    Raises ValueError for a depth below 1, fewer than two arguments or a range of lengths that is
    empty; and, with an example, where expressions so long are never drawn.
    """

    length: int = 2000
    min_length: int = 500
    max_depth: int = 10
    max_args: int = 10
    vocab_size: ClassVar[int] = CLOSE + 1

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("max_depth", 1), ("max_args", 2), ("length", 4)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.min_length > self.length:
            raise ValueError(f"min_length={self.min_length} must be at most length={self.length}")

    def draw(self, rng: np.random.Generator) -> source.Example:
        tokens, value = self._fitting(rng)
        inputs = np.full(self.length, BLANK, np.int32)
        targets, weights = np.zeros_like(inputs), np.zeros(inputs.shape, np.float32)
        inputs[: len(tokens)] = tokens
        targets[len(tokens) - 1], weights[len(tokens) - 1] = DIGIT + value, 1
        return {"inputs": inputs, "targets": targets, "weights": weights}

    def _fitting(self, rng) -> tuple[list[int], int]:
        for _ in range(_TRIES):
            # One call for all randomness of a try: an expression that fits needs at most two
            # numbers a token, so one that runs out of them is too long.
            uniform = iter(rng.random(2 * self.length).tolist())
            tokens = []
            try:
                value = self._expression(uniform.__next__, tokens, 1)
            except StopIteration:
                continue
            if self.min_length <= len(tokens) <= self.length:
                return tokens, value
        raise ValueError(f"{_TRIES} draws of {self} gave no expression of such a length")

    def _expression(self, uniform: Callable[[], float], tokens: list[int], depth: int) -> int:
        """Appends an expression; its value."""
        kind, count = int(4 * uniform()), 2 + int((self.max_args - 1) * uniform())
        tokens.append(OPERATOR + kind)
        values = [self._argument(uniform, tokens, depth) for _ in range(count)]
        tokens.append(CLOSE)
        return list(OPERATORS.values())[kind](values)

    def _argument(self, uniform, tokens, depth) -> int:
        if depth < self.max_depth and uniform() >= 0.75:
            return self._expression(uniform, tokens, depth + 1)
        value = int(10 * uniform())
        tokens.append(DIGIT + value)
        return value


def baselines() -> dict[str, float]:
    """Accuracy of guessing any digit; the most frequent value is right somewhat more often."""
    return {"guess": 1 / 10}


SPEC = registry.Task(fn=LraListops, kind="tokens", baselines=baselines)
