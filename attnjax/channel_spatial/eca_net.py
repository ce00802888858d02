r"""ECA-Net: each channel of an image is weighed by what the channels near it say.

Paper: Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
arXiv:1910.03151, section 3.2 (the convolution across channels) and 3.3 (its size).

    w = sigmoid(conv_k(mean_XY x)),      y = w x
    k = the odd number nearest to log2(D) / gamma + b / gamma,      gamma = 2, b = 1

One kernel of k weights slides over the D channels, which are padded with zeros; there is no bias.

Shapes: B batch, X Y image axes, D channels, k size of the kernel.
Unlike the paper: nothing. Where two odd numbers are equally near, the paper's 80 parameters for
ResNet-50 need the lower, and the authors' code takes the upper: `adaptive_size` does either.
"""

import math
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import layers, registry
from attnjax.core.registry import Claim


def eca_net(x: Float[Array, "B X Y D"], kernel: Float[Array, "k"]) -> Float[Array, "B X Y D"]:
    """x with each channel times its gate, which is computed in float32; in x's dtype.

    Raises ValueError for a kernel of even size, which has no middle.
    """
    if kernel.size % 2 == 0:
        raise ValueError(f"kernel {kernel.shape} must have an odd size")
    image, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    return (image * channel_gate(image.mean((1, 2)), kernel)[:, None, None]).astype(x.dtype)


def channel_gate(pooled: Float[Array, "B D"], kernel: Float[Array, "k"]) -> Float[Array, "B D"]:
    """A weight in (0, 1) for each channel, from the k channels around it."""
    logits = jax.lax.conv_general_dilated(
        pooled[:, None], kernel[None, None], window_strides=(1,), padding="SAME"
    )
    return jax.nn.sigmoid(logits[:, 0])


def adaptive_size(
    D: int, *, gamma: float = 2.0, b: float = 1.0, ties: Literal["down", "up"] = "down"
) -> int:
    """The k of section 3.3 for D channels; `ties` says which of two nearest odd numbers.

    Raises ValueError for other `ties`.
    """
    if ties not in ("down", "up"):
        raise ValueError(f"{ties=} must be 'down' or 'up'")
    half = abs(math.log2(D) + b) / gamma / 2  # the odd numbers are 2 n + 1 for whole n
    return max(2 * math.ceil(half) - 1, 1) if ties == "down" else 2 * math.floor(half) + 1


class EcaNet(nn.Module):
    """ECA over (B X Y D): goes before the sum of a residual block. size None is adaptive."""

    size: int | None = None
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = eca_net

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y D"]) -> Float[Array, "B X Y D"]:
        """x with its channels weighed, in `dtype`."""
        size = adaptive_size(x.shape[-1]) if self.size is None else self.size
        kernel = layers.Table((size,), nn.initializers.normal(size**-0.5), name="kernel")()
        return layers.Attend(self.fn, name="attend")(x.astype(self.dtype or x.dtype), kernel)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    x, kernel = jax.random.split(key)
    return dict(x=jax.random.normal(x, (2, T, 3, 8)), kernel=jax.random.normal(kernel, (5,)))


def _oracle(x, kernel):
    D, size = x.shape[-1], len(kernel)
    band = sum(kernel[i] * jnp.eye(D, k=i - size // 2) for i in range(size))
    pooled = jnp.mean(x, (1, 2))
    return x / (1 + jnp.exp(-jnp.einsum("DC,BC->BD", band, pooled)))[:, None, None]


SPEC = registry.Mechanism(
    fn=eca_net,
    module=EcaNet,
    layout="grid",
    papers=("eca-net",),
    example=_example,
    oracle=_oracle,
    claims=frozenset(
        {
            Claim.PERMUTATION_EQUIVARIANT,
            Claim.LINEAR_MEMORY,
            Claim.LINEAR_COMPUTE,
            Claim.FORWARD_MODE,
        }
    ),
)
