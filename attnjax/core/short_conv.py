"""A causal convolution over the last few tokens, for each channel by itself, that streams.

y_t = sum_{i < W} kernel_i x_{t-i}                    x before the first token: `before`, or 0
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import layers, masks


def short_conv(
    x: Float[Array, "B T *F"],
    kernel: Float[Array, "W *F"],
    before: Float[Array, "B P *F"] | None = None,
    *,
    mask: masks.Mask | None = None,
) -> tuple[Float[Array, "B T *F"], Float[Array, "B P *F"]]:
    """(y, the last P = W - 1 tokens, that the next call takes as `before`), in x's dtype.

    Args:
      kernel: kernel_0 is for the token itself.
      before: the P tokens before these, of the first segment.
      mask: any of Causal (which holds anyway), Valid: padding counts as 0, and Segments: a token
        sees those of its own segment.

    Sums in float32. Raises NotImplementedError for any other mask.
    """
    kinds = masks.Causal, masks.Valid, masks.Segments
    _, valid, segments = masks.select(mask, *kinds, by="short_conv")
    if any(part.kv is not None for part in segments):
        raise NotImplementedError("short_conv can't honour Segments with ids of their own for keys")
    wide = lambda seen: seen.reshape(*seen.shape, *(1,) * (x.ndim - 2))
    for part in valid:
        x = jnp.where(wide(part.keys), x, 0)
    (W, *_), (B, T, *F) = kernel.shape, x.shape
    if before is None:
        before = jnp.zeros((B, W - 1, *F), x.dtype)
    padded = jnp.concatenate([before.astype(x.dtype), x], 1)

    def tap(i):
        shifted = padded[:, W - 1 - i : W - 1 - i + T].astype(jnp.float32) * kernel[i][None, None]
        for part in segments:
            ids = jnp.pad(part.q, ((0, 0), (i, 0)), "edge")[:, :T]
            shifted = jnp.where(wide(part.q == ids), shifted, 0)
        return shifted

    return sum(map(tap, range(W))).astype(x.dtype), padded[:, T:]


class ShortConv(nn.Module):
    """`short_conv` with a learned kernel: parameter `kernel/table` (width, *F)."""

    width: int = 4

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T *F"],
        before: Float[Array, "B P *F"] | None = None,
        *,
        mask: masks.Mask | None = None,
    ) -> tuple[Float[Array, "B T *F"], Float[Array, "B P *F"]]:
        """(y, what the next call takes as `before`). Raises ValueError for a width below 1."""
        if self.width < 1:
            raise ValueError(f"width={self.width} must be at least 1")
        shape = (self.width, *x.shape[2:])
        kernel = layers.Table(shape, nn.initializers.normal(self.width**-0.5), name="kernel")()
        return short_conv(x, kernel, before, mask=mask)


class ConvProjection(nn.Module):
    """(B T D) -> (B T N H): silu of a ShortConv of a projection to heads."""

    num_heads: int
    head_dim: int
    width: int = 4
    dtype: DTypeLike | None = None

    def setup(self):
        self.project = layers.HeadProjection(self.num_heads, self.head_dim, self.dtype)
        self.conv = ShortConv(self.width)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        before: Float[Array, "B P N H"] | None = None,
        *,
        mask: masks.Mask | None = None,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B P N H"]]:
        """As ShortConv."""
        y, last = self.conv(self.project(x), before, mask=mask)
        return nn.silu(y), last

    def init_state(self, batch: int) -> Float[Array, "B P N H"]:
        """What is before the first token."""
        shape = (batch, self.width - 1, self.num_heads, self.head_dim)
        return jnp.zeros(shape, self.dtype or jnp.float32)
