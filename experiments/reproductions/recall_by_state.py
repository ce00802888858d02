"""Linear attention recalls as many pairs as its state has room for; softmax recalls them all.

Command: attnjax reproduce recall_by_state
Minutes: unknown yet.
Paper: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models",
arXiv:2312.04927.

Pairs of a key and a value, then each key once more, in another order: the shortest form of the
task mqar. All models have the width of tokens, the layers and the heads in common; what differs is
the size H of a head, and with it the state, of which a head of linear attention has H + 1 by H + 1
numbers.
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
    """Eight pairs, of which keys and values are 31 and 32 different tokens."""

    vocab_size: int = 64
    """V: keys are 1 to V / 2 - 1, values V / 2 to V - 1."""
    length: int = 32
    """T, of which half are pairs."""
    head_dims: tuple[int, ...] = (4, 8, 16, 32)
    """H, from the smallest up."""
    batch_size: int = 64
    steps: int = 2000
    learning_rate: float = 5e-3


def draw(key, *, batch_size: int, length: int, vocab_size: int):
    """(tokens, targets, weights): pairs, then every key, each followed by a 0."""
    half, pairs = vocab_size // 2, length // 4
    of_keys, of_values, of_order = jax.random.split(key, 3)

    def some(key, tokens, count):
        rows = jnp.broadcast_to(tokens, (batch_size, len(tokens)))
        return jax.random.permutation(key, rows, axis=1, independent=True)[:, :count]

    keys = some(of_keys, jnp.arange(1, half), pairs)
    values = some(of_values, jnp.arange(half, vocab_size), pairs)
    order = some(of_order, jnp.arange(pairs), pairs)
    again, answers = (jnp.take_along_axis(x, order, 1) for x in (keys, values))
    none = jnp.zeros_like(keys)
    in_turn = lambda x, y: jnp.stack([x, y], 2).reshape(batch_size, -1)
    tokens = jnp.concatenate([in_turn(keys, values), in_turn(again, none)], 1)
    targets = jnp.concatenate([in_turn(none, none), in_turn(answers, none)], 1)
    return tokens, targets, (targets > 0).astype(float)


def run(config: Config) -> list[Finding]:
    """Trains linear attention with states of several sizes, and softmax attention."""
    sizes = dict(length=config.length, vocab_size=config.vocab_size)
    data = functools.partial(draw, batch_size=config.batch_size, **sizes)
    options = dict(features=config.features, depth=2, num_heads=2, max_length=config.length)
    options |= dict(mlp_ratio=0.25, vocab_size=config.vocab_size)  # the paper has no MLP

    def accuracy(mixer, label):
        model = models.create("lm", mixers=(mixer,), **options)
        return induction_depth.train(config, model, data, label)

    most = config.head_dims[-1]
    softmax = accuracy(f"multi_head_attention(head_dim={most})", f"softmax, H = {most}")
    right = [
        accuracy(f"fast_attention(order=1, head_dim={H})", f"linear, H = {H}")
        for H in config.head_dims
    ]
    shown = zip(config.head_dims, right, strict=True)
    guess = 100 / (config.length // 4)
    return [
        Finding(
            claim="softmax attention recalls",
            expected=f"accuracy above 99 % with H = {most}",
            seen=f"{100 * softmax:.1f} %",
            agrees=softmax > 0.99,
        ),
        Finding(
            claim="linear attention recalls more with a larger state",
            expected=f"rising with H, from near a guess among what was shown, {guess:.1f} %",
            seen=", ".join(f"{100 * x:.1f} % with H = {H}" for H, x in shown),
            agrees=right == sorted(right) and right[0] < 0.5 < right[-1],
        ),
    ]
