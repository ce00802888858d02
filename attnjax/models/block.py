"""What the backbones share: residual blocks around any mechanism, in a loop or a scan over layers.

x = x + mixer(norm(x)),      x = x + mlp(norm(x))
"""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import layers, masks, registry

Activation = Literal["gelu", "swiglu"]


class Mlp(nn.Module):
    """A layer of `ratio` times the width; with swiglu, its features are gated by as many more."""

    ratio: float | int
    activation: Activation
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        dense = functools.partial(layers.Dense, use_bias=False, dtype=self.dtype)
        F = round(self.ratio * x.shape[-1])
        up = dense(F, name="up")(x)
        up = nn.gelu(up) if self.activation == "gelu" else nn.silu(dense(F, name="gate")(x)) * up
        return dense(x.shape[-1], name="down")(up)


class Block(nn.Module):
    """One residual layer around the mechanism that `text` asks for; x is (B T D) or (B X Y D)."""

    text: str
    num_heads: int
    head_dim: int
    mlp_ratio: float | int
    activation: Activation
    dtype: DTypeLike | None
    parallel: Callable[[registry.Mechanism], Callable] | None

    def setup(self):
        record = registry.get(registry.parse(self.text)[0])
        defaults = dict(num_heads=self.num_heads, head_dim=self.head_dim, dtype=self.dtype)
        if self.parallel is not None:
            defaults["fn"] = self.parallel(record)
        self.layout = record.layout
        self.mixer = registry.build(self.text, **defaults)
        self.mixer_norm = nn.RMSNorm(dtype=self.dtype)
        self.mlp_norm = nn.RMSNorm(dtype=self.dtype)
        self.mlp = Mlp(self.mlp_ratio, self.activation, self.dtype)

    def __call__(
        self, x: Float[Array, "B *T D"], mask: masks.Mask | None = None
    ) -> Float[Array, "B *T D"]:
        """A mechanism over sequences takes an image in row order."""
        y = self.mixer_norm(x)
        if self.layout == "grid":
            y = self.mixer(y)
        else:
            y = self.mixer(y.reshape(y.shape[0], -1, y.shape[-1]), mask=mask).reshape(x.shape)
        return self._after(x, y)

    def init_state(self, batch: int, length: int):
        """The state of the mechanism: see `core.decode`."""
        return self.mixer.init_state(batch, length)

    def extend(self, state, x: Float[Array, "B T D"]):
        """The next T tokens: (state, output)."""
        state, y = self.mixer.extend(state, self.mixer_norm(x))
        return state, self._after(x, y)

    def _after(self, x, y):
        x = x + y
        return x + self.mlp(self.mlp_norm(x))
