"""In-context linear regression: N solved examples of a random linear map, then one to solve.

With d = `dim` and N = `num_examples`, one example is drawn so: w ~ N(0, I_d), and N + 1 inputs
x ~ N(0, I_d), all independent, y = w . x. Row i < N of the inputs is (x_i, y_i), row N is
(x_N, 0), and the target is y_N. The loss of a prediction is its squared error.

The best single layer of linear attention takes one step of gradient descent on the N examples
from w = 0: with step c it predicts c/N sum_i y_i (x_i . x_N), whose expected squared error

    d (1 - 2c + c^2 (1 + (d + 1) / N))

is least at c = N / (N + d + 1), where it is d (d + 1) / (N + d + 1): an anchor without seed noise
(von Oswald et al., arXiv:2212.07677; Zhang, Frei and Bartlett, arXiv:2306.09927).
"""

import dataclasses

import numpy as np

from attnjax.core import registry
from attnjax.tasks import source


@dataclasses.dataclass(frozen=True, kw_only=True)
class IclRegression(source.Generated):
    """{"inputs": float32 [N+1 d+1], "target": float32 scalar}; ValueError for d or N below 1."""

    dim: int = 10
    num_examples: int = 10

    def __post_init__(self):
        super().__post_init__()
        for name in ("dim", "num_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def draw(self, rng: np.random.Generator) -> source.Example:
        w = rng.standard_normal(self.dim)
        x = rng.standard_normal((self.num_examples + 1, self.dim))
        y = x @ w
        inputs = np.concatenate([x, y[:, None]], axis=1).astype(np.float32)
        inputs[-1, -1] = 0
        return {"inputs": inputs, "target": np.asarray(y[-1], np.float32)}


def one_step_error(dim: int, num_examples: int) -> float:
    """Expected squared error of the best step of gradient descent: d (d + 1) / (N + d + 1)."""
    return dim * (dim + 1) / (num_examples + dim + 1)


def baselines() -> dict[str, float]:
    """Expected squared errors at the default options: of predicting 0, and of one best step."""
    dim, num_examples = IclRegression.dim, IclRegression.num_examples
    return {"zero": float(dim), "one_gradient_step": one_step_error(dim, num_examples)}


SPEC = registry.Task(
    fn=IclRegression,
    kind="vectors",
    papers=("icl-multi-head-softmax",),
    baselines=baselines,
)
