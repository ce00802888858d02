r"""The weights by which a selective scan (S6) chooses its steps, as Mamba begins with them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.core import layers


class Selection(nn.Module):
    """The weights of `count` scans of `features` channels: select, widen, bias, log_rate, skip.

    Each channel has `state` entries of a state; `rank` None is features / 16, rounded up. At first
    steps delta are about 0.001 to 0.1, rates -1 to -state, and skips 1. Source: Gu and Dao,
    "Mamba", arXiv:2312.00752, section 3.6.
    """

    count: int
    features: int
    state: int = 16
    rank: int | None = None

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "..."], ...]:
        """select (J H F), widen (J R H), bias (J H), log_rate (J H M), skip (J H).

        F is R + 2M. Raises ValueError for a state below 1.
        """
        J, H, M = self.count, self.features, self.state
        R = -(-H // 16) if self.rank is None else self.rank
        if min(M, R) < 1:
            raise ValueError(f"state={M} and rank={R} must be at least 1")
        narrow = nn.initializers.lecun_normal(batch_axis=0)
        even = lambda key, shape: jax.random.uniform(key, shape, minval=-1, maxval=1) * R**-0.5
        rates = lambda key, shape: jnp.broadcast_to(jnp.log(1.0 + jnp.arange(M)), shape)
        return (
            layers.Table((J, H, R + 2 * M), narrow, name="select")(),
            layers.Table((J, R, H), even, name="widen")(),
            layers.Table((J, H), _small_steps, name="bias")(),
            layers.Table((J, H, M), rates, name="log_rate")(),
            layers.Table((J, H), nn.initializers.ones, name="skip")(),
        )


def _small_steps(key, shape):
    """b with softplus(b) from 0.001 to 0.1, evenly by logarithm."""
    step = 10.0 ** jax.random.uniform(key, shape, minval=-3, maxval=-1)
    return step + jnp.log(-jnp.expm1(-step))
