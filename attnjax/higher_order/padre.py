r"""PADRe: each entry of the output is a polynomial of the input's, by products of linear maps.

Paper: Letourneau et al., "PADRe: A Unifying Polynomial Attention Drop-in Replacement for Efficient
Vision Transformer", arXiv:2407.11306, section 3.

    Y_i = A_i X B_i                                  i = 1 ... I, the degree
    Z_1 = Y_1,     Z_(i+1) = (C_i Z_i D_i) * Y_(i+1)     entry by entry
    O   = sum_i W_i * Z_i + L

A and C mix positions: convolutions, with a kernel for each channel. B and D mix channels. The
entries of Z_i are polynomials of degree i without lower terms, so O holds all degrees up to I.

Shapes: B batch, X Y image axes, D channels, I degree, J = I - 1, P Q kernel.
Unlike the paper: W and L are a number for each channel, so that any size of image will do; there
they may be one for each entry, and the authors' vision models leave degree 1 to the residual and
degree 0 to biases. The channels are mixed before the positions. That accuracy stays that of softmax
attention is a matter of large trainings and unknown here; the cost is linear.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import layers, registry
from attnjax.core.registry import Claim


def padre(
    x: Float[Array, "B X Y D"],
    a: Float[Array, "I P Q D"],
    b: Float[Array, "I D D"],
    c: Float[Array, "J P Q D"],
    d: Float[Array, "J D D"],
    w: Float[Array, "I D"],
    bias: Float[Array, "D"],
) -> Float[Array, "B X Y D"]:
    """O in x's dtype, computed in float32.

    Args:
      a, b: the maps of the input by degree, of positions and of channels.
      c, d: those from one degree to the next.
      w, bias: the weight of each degree, and L.

    The image is padded with zeros. Raises ValueError for a kernel with an even side and where there
    are not I - 1 maps between degrees.
    """
    I, P, Q, _ = a.shape  # noqa: E741
    if not (P % 2 and Q % 2):
        raise ValueError(f"kernels {a.shape} must have odd sides {P=} and {Q=}")
    if not len(c) == len(d) == I - 1:
        raise ValueError(f"c {c.shape} and d {d.shape} must be {I - 1} maps for degree {I}")
    exact = (array.astype(jnp.float32) for array in (x, a, b, c, d, w, bias))
    image, a, b, c, d, w, bias = exact
    row = lambda x: x[None, None, None]
    z = _mix(image, a[0], b[0])
    o = row(w[0]) * z + row(bias)
    for i in range(1, I):
        z = _mix(z, c[i - 1], d[i - 1]) * _mix(image, a[i], b[i])
        o = o + row(w[i]) * z
    return o.astype(x.dtype)


def _mix(
    x: Float[Array, "B X Y D"], kernel: Float[Array, "P Q D"], channels: Float[Array, "D D"]
) -> Float[Array, "B X Y D"]:
    """Channels by a matrix, then positions by a convolution of each channel alone."""
    return jax.lax.conv_general_dilated(
        x @ channels,
        kernel[:, :, None],
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


class Padre(nn.Module):
    """PADRe over (B X Y D) in the place of self-attention."""

    degree: int = 3
    size: int = 11
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = padre

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y D"]) -> Float[Array, "B X Y D"]:
        """A polynomial of x, in `dtype`."""
        I, D, sides = self.degree, x.shape[-1], (self.size, self.size)  # noqa: E741
        if I < 1:
            raise ValueError(f"degree={I} must be at least 1")
        init = nn.initializers.lecun_normal
        kernels, matrices = init((1, 2), 3, 0), init(batch_axis=0)
        a = layers.Table((I, *sides, D), kernels, name="a")()
        b = layers.Table((I, D, D), matrices, name="b")()
        c = layers.Table((I - 1, *sides, D), kernels, name="c")()
        d = layers.Table((I - 1, D, D), matrices, name="d")()
        w = layers.Table((I, D), nn.initializers.ones, name="w")()
        bias = layers.Table((D,), nn.initializers.zeros, name="bias")()
        x = x.astype(self.dtype or x.dtype)
        return layers.Attend(self.fn, name="attend")(x, a, b, c, d, w, bias)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape) / 2
    maps = dict(
        a=draw(1, 3, 3, 5, 4), b=draw(2, 3, 4, 4), c=draw(3, 2, 3, 5, 4), d=draw(4, 2, 4, 4)
    )
    return dict(x=draw(0, 2, T, 3, 4)) | maps | dict(w=draw(5, 3, 4), bias=draw(6, 4))


def _oracle(x, a, b, c, d, w, bias):
    def along(length, side):  # row t, column s: which tap of a kernel leads from s to t
        tap = jnp.arange(length)[None] - jnp.arange(length)[:, None] + side // 2
        return jax.nn.one_hot(tap, side)

    def mix(x, kernel, channels):
        rows, columns = along(x.shape[1], kernel.shape[0]), along(x.shape[2], kernel.shape[1])
        matrix = jnp.einsum("XUP,YVQ,PQD->XYUVD", rows, columns, kernel)
        return jnp.einsum("XYUVD,BUVD->BXYD", matrix, x @ channels)

    y = [mix(x, *maps) for maps in zip(a, b, strict=True)]
    z = [y[0]]
    for kernel, channels, factor in zip(c, d, y[1:], strict=True):
        z.append(mix(z[-1], kernel, channels) * factor)
    return jnp.einsum("IBXYD,ID->BXYD", jnp.stack(z), w) + bias[None, None, None]


SPEC = registry.Mechanism(
    fn=padre,
    module=Padre,
    layout="grid",
    small=dict(size=3),
    papers=("padre",),
    example=_example,
    oracle=_oracle,
    claims=frozenset({Claim.LINEAR_MEMORY, Claim.LINEAR_COMPUTE, Claim.FORWARD_MODE}),
)
