r"""Convolves each channel of an image with a kernel of its own.

    y_xyd = sum_pq kernel_pqd a_{x + p - P // 2, y + q - Q // 2, d}     a: the image, zero beyond it

As a sum over the P Q taps: kernels may differ between the images of a batch, and on CPU it takes a
fraction of the time of a grouped convolution.
"""

import itertools

import jax.numpy as jnp
from jaxtyping import Array, Float


def depthwise_conv(
    x: Float[Array, "B X Y *D"], kernel: Float[Array, "#B P Q *D"]
) -> Float[Array, "B X Y *D"]:
    """y in x's dtype, summed in float32; `kernel` has a batch axis of 1 or of B.

    Raises ValueError for an even side, which has no middle.
    """
    (X, Y), (P, Q) = x.shape[1:3], kernel.shape[1:3]
    if not (P % 2 and Q % 2):
        raise ValueError(f"kernel {kernel.shape} must have odd sides {P=} and {Q=}")
    image, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    border = [(0, 0), (P // 2, P // 2), (Q // 2, Q // 2)]
    image = jnp.pad(image, border + [(0, 0)] * (x.ndim - 3))
    tap = lambda p, q: image[:, p : p + X, q : q + Y] * kernel[:, p, q][:, None, None]
    return sum(tap(p, q) for p, q in itertools.product(range(P), range(Q))).astype(x.dtype)
