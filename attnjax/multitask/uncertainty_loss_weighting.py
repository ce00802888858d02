r"""Uncertainty loss weighting: tasks are weighed by the noise that each is learned to have.

Paper: Kendall et al., "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry
and Semantics", arXiv:1705.07115, eqs. 7 (regression) and 10 (with classification), section 3.2.

    loss = sum_i c_i exp(-s_i) L_i + s_i / 2,        s_i = log sigma_i^2
    c_i  = 1/2 for a regression (Gaussian), 1 for a classification (softmax of temperature sigma^2)

For losses that stand still the best s_i is log(2 c_i L_i): a task weighs about 1 / L_i, whatever
the units of its loss. s_i is learned with the network; the term s_i / 2 keeps it from running off.
As the paper advises, s_i is learned and not sigma_i, so nothing is divided by.
"""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnjax.core import layers, registry

Kind = Literal["regression", "classification"]


def uncertainty_loss_weighting(
    losses: Float[Array, "tasks"],
    log_variance: Float[Array, "tasks"],
    *,
    kind: Kind | Sequence[Kind] = "regression",
) -> Float[Array, ""]:
    """The sum to minimise, in float32. `kind` is one for all tasks or one for each.

    Raises ValueError for another number of kinds than of tasks.
    """
    s = log_variance.astype(jnp.float32)
    return (weights(s, kind=kind) * losses.astype(jnp.float32) + s / 2).sum()


def weights(
    log_variance: Float[Array, "tasks"], *, kind: Kind | Sequence[Kind] = "regression"
) -> Float[Array, "tasks"]:
    """What each loss is multiplied by: c_i exp(-s_i)."""
    count = log_variance.shape[0]
    kinds = [kind] * count if isinstance(kind, str) else kind
    if len(kinds) != count or not set(kinds) <= {"regression", "classification"}:
        raise ValueError(f"{kind=} must be 'regression' or 'classification', or {count} of them")
    factor = np.array([0.5 if k == "regression" else 1.0 for k in kinds], np.float32)
    return factor * jnp.exp(-log_variance)


class UncertaintyLossWeighting(nn.Module):
    """The sum with a learned s_i for each task, which begins at 0: all variances are 1."""

    kind: Kind | Sequence[Kind] = "regression"

    @nn.compact
    def __call__(self, losses: Float[Array, "tasks"]) -> Float[Array, ""]:
        table = layers.Table(losses.shape, nn.initializers.zeros, name="log_variance")
        return uncertainty_loss_weighting(losses, table(), kind=self.kind)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    losses, log_variance = jax.random.normal(key, (2, T))
    return dict(losses=jnp.exp(losses), log_variance=log_variance)


def _oracle(losses, log_variance, *, kind="regression"):
    sigma = jnp.exp(log_variance / 2)
    data = losses / sigma**2 / (2 if kind == "regression" else 1)
    return jnp.sum(data + jnp.log(sigma))


SPEC = registry.Objective(
    fn=uncertainty_loss_weighting,
    papers=("uncertainty-loss-weighting",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(kind="classification")),
)
