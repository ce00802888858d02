"""A state of fixed size copies as much as it can hold; attention copies all.

Command: attnjax reproduce copy_state
Minutes: about 8 on two cores.
Paper: Jelassi et al., "Repeat After Me: Transformers are Better than State Space Models at
Copying", arXiv:2402.01032.

A random string is followed by a sign, after which it is to be said again. Softmax attention keeps
every token. A recurrence of H features for keys and values keeps an H by H matrix for each head,
from which about H values can be read without confusion.
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
    """Strings of 32 tokens, and heads of 2 to 16 features."""

    length: int = 32
    """Tokens of a string."""
    head_dims: tuple[int, ...] = (2, 4, 8, 16)
    """Features of the two heads of the recurrence, from the smallest up."""
    steps: int = 1500


def draw(key, *, batch_size: int, length: int, vocab_size: int):
    """(tokens, targets, weights): a string, 0, and the string again."""
    string = jax.random.randint(key, (batch_size, length), 1, vocab_size)
    tokens = jnp.concatenate([string, jnp.zeros_like(string[:, :1]), string[:, :-1]], 1)
    none = jnp.zeros_like(string)
    targets = jnp.concatenate([none, string], 1)
    return tokens, targets, jnp.concatenate([none, none + 1], 1).astype(float)


def run(config: Config) -> list[Finding]:
    """Trains softmax attention, and a recurrence with states of several sizes."""
    sizes = dict(length=config.length, vocab_size=config.vocab_size)
    data = functools.partial(draw, batch_size=config.batch_size, **sizes)

    def accuracy(mixer, label):
        options = dict(features=config.features, depth=2, num_heads=2, mixers=(mixer,))
        places = dict(vocab_size=config.vocab_size, max_length=2 * config.length)
        return induction_depth.train(config, models.create("lm", **options, **places), data, label)

    softmax = accuracy("multi_head_attention", "softmax attention")
    right = {
        H: accuracy(f"gated_delta_net(head_dim={H})", f"state of {H} x {H} a head")
        for H in config.head_dims
    }
    small, large = right[config.head_dims[0]], right[config.head_dims[-1]]
    return [
        Finding(
            claim="softmax attention copies the string",
            expected="accuracy above 99 %",
            seen=f"{100 * softmax:.1f} %",
            agrees=softmax > 0.99,
        ),
        Finding(
            claim="a recurrence copies the better the larger its state",
            expected="rising, and low for the smallest",
            seen=", ".join(f"{100 * x:.1f} % with {H} x {H}" for H, x in right.items()),
            agrees=small < 0.5
            and large > small + 0.2
            and list(right.values()) == sorted(right.values()),
        ),
    ]
