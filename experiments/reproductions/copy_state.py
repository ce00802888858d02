"""A state of fixed size copies as much as it can hold; attention copies all.

Command: attnjax reproduce copy_state
Minutes: 3 on one core that had other work too.
Paper: Jelassi et al., "Repeat After Me: Transformers are Better than State Space Models at
Copying", arXiv:2402.01032.

A random string is followed by a sign, after which it is to be said again. All strings have the
same length, so one layer can find a token by its place. Softmax attention keeps every token; gated
linear attention of one head with H features hands an H by H matrix from the string to its copy,
and nothing else.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attnjax import models
from experiments.finding import Finding
from experiments.reproductions import induction_depth


@dataclasses.dataclass(frozen=True)
class Config(induction_depth.Config):
    """Strings of 16 tokens, and states of 2 x 2 to 16 x 16."""

    vocab_size: int = 16
    """V, with the sign."""
    length: int = 16
    """Tokens of a string."""
    head_dims: tuple[int, ...] = (2, 4, 8, 16)
    """H, from the smallest up."""
    batch_size: int = 64
    steps: int = 700
    learning_rate: float = 1e-2


def draw(key, *, batch_size: int, length: int, vocab_size: int):
    """(tokens, targets, weights): a string, 0, and the string again but for its last token."""
    string = jax.random.randint(key, (batch_size, length), 1, vocab_size)
    none = jnp.zeros_like(string)
    tokens = jnp.concatenate([string, none[:, :1], string[:, :-1]], 1)
    targets = jnp.concatenate([none, string], 1)
    return tokens, targets, jnp.concatenate([none, none + 1], 1).astype(float)


def run(config: Config) -> list[Finding]:
    """Trains softmax attention, and a recurrence with states of several sizes."""
    sizes = dict(length=config.length, vocab_size=config.vocab_size)
    data = functools.partial(draw, batch_size=config.batch_size, **sizes)
    options = dict(features=config.features, depth=1, num_heads=1, max_length=2 * config.length)

    def accuracy(mixer, label):
        model = models.create("lm", vocab_size=config.vocab_size, mixers=(mixer,), **options)
        return induction_depth.train(config, model, data, label)

    softmax = accuracy("multi_head_attention", "softmax attention")
    right = {
        H: accuracy(f"gated_linear_attention(head_dim={H})", f"state of {H} x {H}")
        for H in config.head_dims
    }
    guess, shares = 1 / (config.vocab_size - 1), [*right.values()]
    return [
        Finding(
            claim="softmax attention copies the string",
            expected="accuracy above 99 %",
            seen=f"{100 * softmax:.1f} %",
            agrees=softmax > 0.99,
        ),
        Finding(
            claim="a recurrence copies better with a larger state",
            expected=f"rising, and for the smallest nearer to that of a guess, {100 * guess:.1f} %",
            seen=", ".join(f"{100 * x:.1f} % with {H} x {H}" for H, x in right.items()),
            agrees=shares[0] < (guess + shares[-1]) / 2 and shares == sorted(shares),
        ),
    ]
