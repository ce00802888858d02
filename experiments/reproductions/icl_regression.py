"""One layer of linear attention learns to do regression in context, as well as theory says it can.

Command: attnjax reproduce icl_regression
Minutes: about 2 on two cores.
Papers: von Oswald et al., arXiv:2212.07677; Ahn et al., arXiv:2306.00297; Zhang, Frei and Bartlett,
arXiv:2306.09927.

The prompt is of N examples (x_i, w . x_i) and a query (x, 0); the answer is w . x. The best that a
layer of linear attention can do is one step of gradient descent from 0, whose expected squared
error is d (d + 1) / (N + d + 1): a number without seed noise.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attnjax.core import registry
from attnjax.ops import linear_recurrence
from attnjax.tasks import icl_regression
from experiments import fitting
from experiments.finding import Finding


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults are the setting of von Oswald et al., with Adam."""

    dim: int = 10
    """d, features of an input."""
    num_examples: int = 10
    """N, examples in a prompt."""
    batch_size: int = 2048
    """Prompts in an update."""
    steps: int = 3000
    """Updates."""
    learning_rate: float = 3e-3
    """At the start; it falls to 0."""
    seed: int = 0
    """Of parameters and prompts."""


def linear(q, k, v, *, mask=None, scale: float):
    """sum_s (q_t . k_s) v_s `scale`, over the s up to t."""
    none = jnp.zeros((*q.shape[:3], 1))
    return scale * linear_recurrence.linear_recurrence(q, k, v, log_decay=none)[0]


def draw(key, *, batch_size: int, dim: int, num_examples: int):
    """(prompts, answers): those of the task icl_regression, drawn on the device."""
    w, x = (jax.random.normal(k, s) for k, s in zip(
        jax.random.split(key), [(batch_size, dim), (batch_size, num_examples + 1, dim)],
        strict=True))  # fmt: skip
    y = jnp.einsum("BTD,BD->BT", x, w)
    return jnp.concatenate([x, y.at[:, -1].set(0)[..., None]], -1), y[:, -1]


def predict(module, params, prompts):
    """What a layer says in place of the 0 at the end of a prompt."""
    return module.apply(params, prompts)[:, -1, -1]


def train(module, config, label):
    """A layer's parameters, and its mean squared error on new prompts."""
    prompts = functools.partial(draw, batch_size=config.batch_size, dim=config.dim,
                                num_examples=config.num_examples)  # fmt: skip
    loss = lambda params, x, y: jnp.mean((predict(module, params, x) - y) ** 2)
    params = fitting.initial(module, prompts, seed=config.seed)
    options = dict(steps=config.steps, learning_rate=config.learning_rate, seed=config.seed)
    params = fitting.fit(loss, params, prompts, label=label, **options)
    return params, fitting.mean_loss(loss, params, prompts, batches=100, seed=config.seed + 1)


def layer(config, **options):
    """A layer of attention over the rows of a prompt, whose heads hold a whole row."""
    build = registry.get("multi_head_attention").module
    return build(num_heads=1, head_dim=config.dim + 1, **options)


def run(config: Config) -> list[Finding]:
    """Trains a layer of linear and one of softmax attention."""
    best = icl_regression.one_step_error(config.dim, config.num_examples)
    identity = functools.partial(linear, scale=1 / config.num_examples)
    _, error = train(layer(config, fn=identity), config, "linear attention")
    _, softmax = train(layer(config), config, "softmax attention")
    return [
        Finding(
            claim="trained linear attention is as good as the best step of gradient descent",
            expected=f"squared error {best:.3f}",
            seen=f"{error:.3f}",
            agrees=abs(error / best - 1) < 0.01,
        ),
        Finding(
            claim="one head of softmax attention is worse at it",
            expected=f"above {best:.3f}",
            seen=f"{softmax:.3f}",
            agrees=softmax > 1.05 * best,
        ),
    ]
