"""Two layers of attention find what came after a token the last time; one layer can't.

Command: attnjax reproduce induction_depth
Minutes: 7 on two cores that had other work too.
Paper: Olsson et al., "In-context Learning and Induction Heads", arXiv:2209.11895.

In the task induction a trigger stands somewhere in random tokens and again at the end; the answer
is the token after the first. A token doesn't know its predecessor until a layer has told it, so
the layer that looks for the trigger must be a second one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attnjax import models
from experiments import fitting
from experiments.finding import Finding


@dataclasses.dataclass(frozen=True)
class Config:
    """The task's own length and vocabulary."""

    vocab_size: int = 16
    """V, with the trigger."""
    length: int = 64
    """T."""
    features: int = 64
    """Of a token, in the model."""
    batch_size: int = 128
    """Sequences in an update."""
    steps: int = 1000
    """Updates."""
    learning_rate: float = 3e-3
    """At the start; it falls to 0."""
    seed: int = 0
    """Of parameters and sequences."""


def draw(key, *, batch_size: int, length: int, vocab_size: int):
    """(tokens, targets, weights): those of the task induction, drawn on the device."""
    of_tokens, of_place = jax.random.split(key)
    tokens = jax.random.randint(of_tokens, (batch_size, length), 1, vocab_size)
    first = jax.random.randint(of_place, (batch_size,), 0, length - 2)
    row = jnp.arange(batch_size)
    tokens = tokens.at[row, first].set(0).at[:, -1].set(0)
    none = jnp.zeros_like(tokens)
    return tokens, none.at[:, -1].set(tokens[row, first + 1]), none.at[:, -1].set(1).astype(float)


def train(config, model, data, label: str) -> float:
    """Share of right answers, where weights are 1, on new sequences."""

    def loss(params, tokens, targets, weights):
        log_p = jax.nn.log_softmax(model.apply(params, tokens))
        own = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        return -(own * weights).sum() / weights.sum()

    def accuracy(params, tokens, targets, weights):
        right = model.apply(params, tokens).argmax(-1) == targets
        return (right * weights).sum() / weights.sum()

    params = fitting.initial(model, data, seed=config.seed)
    options = dict(steps=config.steps, learning_rate=config.learning_rate, seed=config.seed)
    params = fitting.fit(loss, params, data, label=label, **options)
    return fitting.mean_loss(accuracy, params, data, batches=20, seed=config.seed + 1)


def run(config: Config) -> list[Finding]:
    """Trains models of one layer and of two."""
    sizes = dict(length=config.length, vocab_size=config.vocab_size)
    data = functools.partial(draw, batch_size=config.batch_size, **sizes)
    options = dict(features=config.features, num_heads=2, max_length=config.length)
    model = functools.partial(
        models.create, "lm", vocab_size=config.vocab_size, mixers=("multi_head_attention",)
    )
    right = {
        depth: train(config, model(depth=depth, **options), data, f"depth {depth}")
        for depth in (1, 2)
    }
    guess = 1 / (config.vocab_size - 1)
    return [
        Finding(
            claim="two layers of attention do induction",
            expected="accuracy above 99 %",
            seen=f"{100 * right[2]:.1f} %",
            agrees=right[2] > 0.99,
        ),
        Finding(
            claim="one layer doesn't",
            expected=f"accuracy near that of a guess, {100 * guess:.1f} %",
            seen=f"{100 * right[1]:.1f} %",
            agrees=right[1] < 0.5,
        ),
    ]
