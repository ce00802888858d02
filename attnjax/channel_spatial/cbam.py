r"""CBAM: an image's channels are weighed, then its positions, each by a gate from pooled features.

Paper: Woo et al., "CBAM: Convolutional Block Attention Module", arXiv:1807.06521, eqs. 1 to 3.

    c  = sigmoid(mlp(mean_XY x) + mlp(max_XY x)),      mlp(a) = relu(a down) up
    x' = c x
    p  = sigmoid(conv([mean_D x', max_D x']))          one convolution, 7 by 7, from 2 channels to 1
    y  = p x'

Shapes: B batch, X Y image axes, D channels, F = D / reduction.
Unlike the paper: no batch normalisation after the convolution, which only the authors' code has;
so neither gate holds any state, and the equations are all there is.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import layers, registry
from attnjax.core.registry import Claim


def cbam(
    x: Float[Array, "B X Y D"],
    down: Float[Array, "D F"],
    up: Float[Array, "F D"],
    kernel: Float[Array, "P Q 2 1"],
) -> Float[Array, "B X Y D"]:
    """Eq. 1: both gates, channels first.

    Args:
      down, up: the two layers that the mean and the maximum go through.
      kernel: of the convolution over the mean (first) and the maximum of all channels. Its sides
        are odd, and the image is padded with zeros.

    Gates are computed in float32. Returns the output in x's dtype. Raises ValueError for an even
    side.
    """
    if not all(side % 2 for side in kernel.shape[:2]):
        raise ValueError(f"kernel {kernel.shape} must have odd sides")
    image, down, up, kernel = (a.astype(jnp.float32) for a in (x, down, up, kernel))
    image = image * channel_gate(image, down, up)[:, None, None]
    return (image * position_gate(image, kernel)).astype(x.dtype)


def channel_gate(
    x: Float[Array, "B X Y D"], down: Float[Array, "D F"], up: Float[Array, "F D"]
) -> Float[Array, "B D"]:
    """Eq. 2: a weight in (0, 1) for each channel."""
    pooled = jnp.stack([x.mean((1, 2)), x.max((1, 2))])
    hidden = jax.nn.relu(jnp.einsum("PBD,DF->PBF", pooled, down))
    return jax.nn.sigmoid(jnp.einsum("PBF,FD->BD", hidden, up))


def position_gate(
    x: Float[Array, "B X Y D"], kernel: Float[Array, "P Q 2 1"]
) -> Float[Array, "B X Y 1"]:
    """Eq. 3: a weight in (0, 1) for each position."""
    pooled = jnp.stack([x.mean(-1), x.max(-1)], -1)
    layout = ("NHWC", "HWIO", "NHWC")
    logits = jax.lax.conv_general_dilated(
        pooled, kernel, window_strides=(1, 1), padding="SAME", dimension_numbers=layout
    )
    return jax.nn.sigmoid(logits)


class Cbam(nn.Module):
    """CBAM over (B X Y D): goes before the sum of a residual block."""

    reduction: int = 16
    size: int = 7
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = cbam

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y D"]) -> Float[Array, "B X Y D"]:
        """x with its channels and positions weighed, in `dtype`."""
        D, F = x.shape[-1], x.shape[-1] // self.reduction
        if F < 1:
            raise ValueError(f"reduction={self.reduction} must be at most the {D=} channels")
        init = nn.initializers.lecun_normal()
        down = layers.Table((D, F), init, name="down")()
        up = layers.Table((F, D), init, name="up")()
        kernel = layers.Table((self.size, self.size, 2, 1), init, name="kernel")()
        x = x.astype(self.dtype or x.dtype)
        return layers.Attend(self.fn, name="attend")(x, down, up, kernel)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    x, down, up, kernel = jax.random.split(key, 4)
    return dict(
        x=jax.random.normal(x, (2, T, 3, 8)),
        down=jax.random.normal(down, (8, 4)),
        up=jax.random.normal(up, (4, 8)),
        kernel=jax.random.normal(kernel, (7, 5, 2, 1)) / 4,
    )


def _oracle(x, down, up, kernel):
    mlp = lambda a: jnp.maximum(a @ down, 0) @ up
    sigmoid = lambda a: 1 / (1 + jnp.exp(-a))
    x = x * sigmoid(mlp(jnp.mean(x, (1, 2))) + mlp(jnp.max(x, (1, 2))))[:, None, None]
    maps = [jnp.mean(x, -1), jnp.max(x, -1)]
    P, Q, *_ = kernel.shape
    (X, Y), logits = x.shape[1:3], 0
    for p in range(P):
        for q in range(Q):
            for c, image in enumerate(maps):
                padded = jnp.pad(image, ((0, 0), (P // 2, P // 2), (Q // 2, Q // 2)))
                logits += kernel[p, q, c, 0] * padded[:, p : p + X, q : q + Y]
    return x * sigmoid(logits)[..., None]


SPEC = registry.Mechanism(
    fn=cbam,
    module=Cbam,
    layout="grid",
    papers=("cbam",),
    example=_example,
    oracle=_oracle,
    claims=frozenset({Claim.LINEAR_MEMORY, Claim.LINEAR_COMPUTE, Claim.FORWARD_MODE}),
)
