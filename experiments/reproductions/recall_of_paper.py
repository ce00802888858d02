"""Softmax attention recalls in the first cell of the Zoology paper; linear attention doesn't.

Command: attnjax reproduce recall_of_paper
Minutes: 16 on one core that had other work too.
Paper: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models",
arXiv:2312.04927, section 4 and figure 2: 64 tokens, 4 pairs, a vocabulary of 8192, width 64.

The examples are those of the task mqar, drawn on the device and without end. Tokens have one table
for input and output, and only answers get logits: of other positions nothing is asked.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attnjax import models
from experiments import fitting
from experiments.finding import Finding
from experiments.reproductions import induction_depth


@dataclasses.dataclass(frozen=True)
class Config(induction_depth.Config):
    """The paper's cell; two layers, one head."""

    vocab_size: int = 8192
    """V: keys are 1 to V / 2 - 1, values V / 2 to V - 1."""
    num_pairs: int = 4
    """P."""
    power_a: float = 0.01
    """Distances of questions follow a power law with it; 1 is uniform."""
    batch_size: int = 64
    steps: int = 4000
    learning_rate: float = 5e-3


def draw(key, *, batch_size: int, length: int, vocab_size: int, num_pairs: int, power_a: float):
    """(tokens (B T), where the keys stand again (B P), their values (B P))."""
    half, end = vocab_size // 2, 2 * num_pairs
    slots = (length - end) // 2
    log_odds = (power_a - 1) * jnp.log(jnp.arange(1, slots + 1))

    def one(key):
        of_keys, of_values, of_slots = jax.random.split(key, 3)
        keys = 1 + distinct(of_keys, half - 1, num_pairs)
        values = half + distinct(of_values, vocab_size - half, num_pairs)
        # the largest of logarithms with Gumbel noise are draws without replacement, in their order
        noisy = log_odds + jax.random.gumbel(of_slots, (slots,))
        at = end + 2 * jax.lax.top_k(noisy, num_pairs)[1]
        pairs = jnp.stack([keys, values], 1).reshape(-1)
        tokens = jnp.zeros(length, int).at[:end].set(pairs).at[at].set(keys)
        return tokens, at, values

    return jax.vmap(one)(jax.random.split(key, batch_size))


def distinct(key, most: int, count: int):
    """`count` different numbers below `most`; without sorting all of them, as `choice` would."""
    chosen = jnp.zeros(0, int)
    for number in jax.random.randint(key, (count,), 0, most - jnp.arange(count)):
        for other in jnp.sort(chosen):  # numbers are counted without those that are taken
            number += number >= other
        chosen = jnp.append(chosen, number)
    return chosen


def run(config: Config) -> list[Finding]:
    """Trains both from the same seed."""
    fields = ("batch_size", "length", "vocab_size", "num_pairs", "power_a")
    data = functools.partial(draw, **{name: getattr(config, name) for name in fields})
    softmax = accuracy(config, data, "multi_head_attention")
    linear = accuracy(config, data, "fast_attention(order=1)")
    guess = f"a guess among what was shown: {100 / config.num_pairs:.1f} %"
    return [
        Finding(
            claim="softmax attention recalls",
            expected="accuracy above 99 %",
            seen=f"{100 * softmax:.1f} %",
            agrees=softmax > 0.99,
        ),
        Finding(
            claim="linear attention of the same width recalls less",
            expected=f"less than softmax ({guess})",
            seen=f"{100 * linear:.1f} %",
            agrees=linear < softmax - 0.1,
        ),
    ]


def accuracy(config, data, mixer: str) -> float:
    """Share of right answers on new examples, after training."""
    model = models.create(
        "lm",
        mixers=(mixer,),
        vocab_size=config.vocab_size,
        features=config.features,
        depth=2,
        num_heads=1,
        max_length=config.length,
        mlp_ratio=0.25,
        tie_embeddings=True,
    )

    def loss(params, tokens, at, values):
        log_p = jax.nn.log_softmax(model.apply(params, tokens, at=at))
        return -jnp.take_along_axis(log_p, values[..., None], -1).mean()

    right = lambda params, tokens, at, values: jnp.mean(
        model.apply(params, tokens, at=at).argmax(-1) == values
    )
    params = fitting.initial(model, data, seed=config.seed)
    options = dict(steps=config.steps, learning_rate=config.learning_rate, seed=config.seed)
    params = fitting.fit(loss, params, data, label=mixer, **options)
    return fitting.mean_loss(right, params, data, batches=20, seed=config.seed + 1)
