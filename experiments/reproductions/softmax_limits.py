"""The more tokens softmax selects, or chooses from, the less it sets them apart.

Command: attnjax reproduce softmax_limits
Minutes: 2 on one core that had other work too.
Paper: Mudarisov et al., "Limitations of Normalization in Attention Mechanism", arXiv:2508.17821.

A language model of two layers, in the place of the paper's GPT-2, is trained on Python's standard
library. What is measured is the last query of windows from files that it hasn't seen: its weights
in every head of every layer, and the tokens as that layer reads them, brought to length 1. Numbers
are means over these queries, but for the largest Jacobian: it is that of the rare query with two
weights near 1/2, and the others' does not grow.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attnjax import models
from attnjax.analysis import softmax_limits as limits
from attnjax.core import edit
from attnjax.tasks import source_text
from experiments import fitting
from experiments.finding import Finding

_TEMPERATURES = (1.0, 0.1, 0.01)


@dataclasses.dataclass(frozen=True)
class Config:
    """A model that is trained in a minute on windows of 128 bytes."""

    features: int = 64
    """Of a token, in the model."""
    top: int = 4
    """N, the tokens that are selected, where it isn't varied."""
    tops: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """N, where it is varied, from the smallest up."""
    lengths: tuple[int, ...] = (16, 32, 64, 128)
    """Bytes of a window, from the shortest to that of training."""
    batch_size: int = 32
    """Windows in an update, and in a measurement."""
    steps: int = 600
    """Updates."""
    learning_rate: float = 5e-3
    """At the start; it falls to 0."""
    seed: int = 0
    """Of parameters and windows."""


def corpus(split: str) -> jax.Array:
    """All bytes of a split but the last."""
    size = len(source_text.SourceText(split, length=1))
    return jnp.asarray(source_text.SourceText(split, length=size)[0]["inputs"])


def draw(key, text, *, batch_size: int, length: int = 128):
    """(bytes, the bytes after them) from random places of a text."""
    start = jax.random.randint(key, (batch_size, 1), 0, len(text) - length)
    window = text[start + jnp.arange(length + 1)[None]]
    return window[:, :-1], window[:, 1:]


def train(config: Config):
    """(a model, its parameters)."""
    mixers = ("multi_head_attention(rotary_base=10000.0)",)
    options = dict(features=config.features, depth=2, num_heads=4, mixers=mixers)
    model = models.create("lm", vocab_size=256, **options)

    def loss(params, tokens, targets):
        log_p = jax.nn.log_softmax(model.apply(params, tokens))
        return -jnp.take_along_axis(log_p, targets[..., None], -1).mean()

    data = functools.partial(draw, text=corpus("train"), **_sizes(config))
    params = fitting.initial(model, data, seed=config.seed)
    options = dict(steps=config.steps, learning_rate=config.learning_rate, seed=config.seed)
    return model, fitting.fit(loss, params, data, label="language model", **options)


def _sizes(config):
    return dict(batch_size=config.batch_size, length=config.lengths[-1])


def look(model, params, tokens):
    """The last query's logits (layer B N S), up to a constant, and its tokens (layer B N S D)."""
    inputs = lambda module, _: module.name == "mixer_norm"
    apply = edit.read(model.apply)
    (_, kept), maps = apply(params, tokens, capture_intermediates=inputs)
    logits = jnp.log(jnp.stack([w[:, :, -1] for w in maps.values()]))
    blocks = kept["intermediates"].values()
    x = jnp.stack([block["mixer_norm"]["__call__"][0] for block in blocks])
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    return logits, jnp.broadcast_to(x[:, :, None], (*logits.shape, x.shape[-1]))


@functools.partial(jax.jit, static_argnames=("model", "config"))
def measure(model, params, tokens, config: Config):
    """What is varied, over all rows: (mass, {top: share}, {length: distance}, {t: slope}).

    One program, in which nothing is computed that these don't need.
    """
    seen = {S: look(model, params, tokens[:, -S:]) for S in config.lengths}
    longest = seen[config.lengths[-1]]
    of = lambda name, rows, **options: limits.softmax_limits(*rows, **options)[name]
    return (
        of("mass", longest, top=config.top).mean(),
        {N: of("distinguishable", longest, top=N).mean() for N in config.tops},
        {S: of("distance", rows, top=config.top).mean() for S, rows in seen.items()},
        {t: of("jacobian_norm", longest, top=1, temperature=t) for t in _TEMPERATURES},
    )


def run(config: Config) -> list[Finding]:
    """Trains the model, and looks at its weights."""
    model, params = train(config)
    tokens, _ = draw(jax.random.key(config.seed + 1), corpus("test"), **_sizes(config))
    found = measure(model, params, tokens, config)
    mass, share, distance, slope = jax.device_get(found)
    slope = {t: slope[t] for t in _TEMPERATURES}  # in their order
    falls = lambda x: list(x.values()) == sorted(x.values(), reverse=True)
    return [
        Finding(
            claim=f"the model selects: {config.top} of {tokens.shape[1]} tokens have most weight",
            expected="above 50 %",
            seen=f"{100 * mass:.1f} %",
            agrees=bool(mass > 0.5),
        ),
        Finding(
            claim="the more tokens are selected, the fewer are told from the rest",
            expected="falling",
            seen=", ".join(f"{100 * x:.0f} % of {N}" for N, x in share.items()),
            agrees=falls(share),
        ),
        Finding(
            claim="a selection is set apart less the longer the text",
            expected="a distance that falls",
            seen=", ".join(f"{x:.3f} at {S}" for S, x in distance.items()),
            agrees=falls(distance),
        ),
        Finding(
            claim="the largest Jacobian of softmax grows as 1 / temperature",
            expected=", ".join(f"{0.5 / t:g} at {t:g}" for t in _TEMPERATURES),
            seen=", ".join(
                f"{x.max():.3g} (mean {x.mean():.3g}) at {t:g}" for t, x in slope.items()
            ),
            agrees=all(0.4 < t * x.max() <= 0.5 + 1e-4 for t, x in slope.items()),
        ),
    ]
