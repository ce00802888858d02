"""One head of full rank finds the nearest of some points; as many parameters in thin heads don't.

Command: attnjax reproduce rank_of_heads
Minutes: less than 1 on two cores.
Papers: Amsel et al., "On the Benefits of Rank in Attention Layers" (key rank-vs-heads);
Bhojanapalli et al., "Low-Rank Bottleneck in Multi-head Attention Models" (key fixed-head-size).

N points on a sphere in d dimensions are keys and values, another point is the query, and the answer
is the point nearest to it. A head whose queries and keys are a large multiple of the identity
gives it; d heads of one feature each have the same parameters for queries and keys.
"""

import dataclasses
import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnjax.core import registry
from experiments import fitting
from experiments.finding import Finding


@dataclasses.dataclass(frozen=True)
class Config:
    """d = 16 and N = 8, where a few minutes are enough."""

    dim: int = 16
    """d."""
    num_points: int = 8
    """N."""
    batch_size: int = 512
    """Queries in an update, with points of their own."""
    steps: int = 2000
    """Updates."""
    learning_rate: float = 1e-2
    """At the start; it falls to 0."""
    seed: int = 0
    """Of parameters and points."""


class Retrieve(nn.Module):
    """Heads of `head_dim` features for queries and keys, and of d for values."""

    num_heads: int
    head_dim: int

    @nn.compact
    def __call__(self, x, points):
        D, N, H = x.shape[-1], self.num_heads, self.head_dim
        heads = lambda name, x, size: nn.DenseGeneral((N, size), use_bias=False, name=name)(x)
        q, k = heads("query", x[:, None], H), heads("key", points, H)
        o = registry.get("multi_head_attention").fn(q, k, heads("value", points, D))
        return nn.DenseGeneral(D, axis=(-2, -1), use_bias=False, name="out")(o)[:, 0]


def draw(key, *, batch_size: int, dim: int, num_points: int):
    """(query, points, nearest)."""
    x = jax.random.normal(key, (batch_size, num_points + 1, dim))
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    query, points = x[:, 0], x[:, 1:]
    nearest = jnp.argmax(jnp.einsum("BD,BSD->BS", query, points), -1)
    return query, points, jnp.take_along_axis(points, nearest[:, None, None], 1)[:, 0]


def by_hand(config: Config, multiples: Sequence[float]) -> dict[float, float]:
    """The errors of one head whose queries and keys are multiples of the identity."""
    attend = registry.get("multi_head_attention").fn

    @jax.jit
    def error(multiple):
        query, points, nearest = draw(jax.random.key(config.seed), **_sizes(config))
        o = attend(multiple * query[:, None, None], points[:, :, None], points[:, :, None])
        return jnp.mean(jnp.sum((o[:, 0, 0] - nearest) ** 2, -1))

    return {multiple: float(error(multiple)) for multiple in multiples}


def _sizes(config):
    return dict(batch_size=config.batch_size, dim=config.dim, num_points=config.num_points)


def train(config: Config, module: Retrieve, label: str) -> float:
    """Mean squared distance from the nearest point, on new points."""
    data = functools.partial(draw, **_sizes(config))
    loss = lambda params, x, points, y: jnp.mean(
        jnp.sum((module.apply(params, x, points) - y) ** 2, -1)
    )
    params = fitting.initial(module, data, seed=config.seed, inputs=2)
    options = dict(steps=config.steps, learning_rate=config.learning_rate, seed=config.seed)
    params = fitting.fit(loss, params, data, label=label, **options)
    return fitting.mean_loss(loss, params, data, batches=50, seed=config.seed + 1)


def run(config: Config) -> list[Finding]:
    """The head by hand, then both kinds trained."""
    sharp = by_hand(config, (10.0, 100.0, 1000.0, 10000.0))
    full = train(config, Retrieve(1, config.dim), "one head of full rank")
    thin = train(config, Retrieve(config.dim, 1), f"{config.dim} heads of rank 1")
    return [
        Finding(
            claim="queries and keys that are a large multiple of the identity find the nearest",
            expected="the error falls to 0 with the multiple",
            seen=", ".join(f"{error:.4f} at {beta:g}" for beta, error in sharp.items()),
            agrees=list(sharp.values()) == sorted(sharp.values(), reverse=True)
            and sharp[10000.0] < 0.01,
        ),
        Finding(
            claim="one head of full rank learns it better than as many parameters in thin heads",
            expected="one head < d heads of rank 1",
            seen=f"{full:.3f} and {thin:.3f}",
            agrees=full < 0.5 * thin,
        ),
    ]
