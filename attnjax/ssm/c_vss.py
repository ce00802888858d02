r"""C-VSS: scans of an image, scaled and shifted by what kind of image it is.

Paper: Hosseini et al., "SUM: Saliency Unification through Mamba for Visual Attention Modeling",
arXiv:2406.17815, section 3.2 (conditional visual state space block).

    x' = x (1 + scale_1) + shift_1,      u = silu(conv_3x3(x' P_u))
    z  = (layer_norm(ss2d(u)) * gain + offset) (1 + scale_2) + shift_2
    y  = P_o (z * silu(x' P_z))
    [scale_1, shift_1, scale_2, shift_2] = mlp(prompt_k)           for an image of kind k

ss2d sums selective scans along four routes, as in VMamba (`ops.cross_scan`). A prompt is learned
for each kind of image, natural scene, web page and so on, and says four numbers: that is all by
which one model for all kinds tells them apart. With zeros the block is VMamba's.

Shapes: B batch, X Y image axes, H channels of the scans, M entries of a channel's state, R rank of
the steps, F = R + 2M, K kinds, P features of a prompt, D model dim.
Unlike the paper: a fifth number, that scales what the scans give, is left out, as layer_norm undoes
it; the mlp has one hidden layer; projections of x and the convolution have no biases. The U-Net of
these blocks is left out.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnjax.core import layers, registry, selection
from attnjax.core.registry import Claim
from attnjax.ops import cross_scan as ops
from attnjax.ops import depthwise_conv as convolutions
from pallas_kernels import selective_scan as kernels


def c_vss(
    u: Float[Array, "B X Y H"],
    modulation: Float[Array, "B 2"],
    select: Float[Array, "4 H F"],
    widen: Float[Array, "4 R H"],
    bias: Float[Array, "4 H"],
    log_rate: Float[Array, "4 H M"],
    skip: Float[Array, "4 H"],
    gain: Float[Array, "H"],
    offset: Float[Array, "H"],
    *,
    implementation: kernels.Implementation | None = "xla",
) -> Float[Array, "B X Y H"]:
    """z, in u's dtype.

    Args:
      modulation: scale_2 and shift_2 of each image.
      select, widen, bias, log_rate, skip: as in `ops.selective_scan.selected_scan`, for each route.
      implementation: of the scans, as in `ops.selective_scan`.

    Raises ValueError for weights that don't fit each other.
    """
    weights = select, widen, bias, log_rate, skip
    y = ops.ss2d(u, *weights, implementation=implementation).astype(jnp.float32)
    y = jax.nn.standardize(y, epsilon=1e-6) * gain[None, None, None] + offset[None, None, None]
    return modulate(y, modulation.astype(jnp.float32)).astype(u.dtype)


def modulate(
    x: Float[Array, "B X Y H"], modulation: Float[Array, "B 2"]
) -> Float[Array, "B X Y H"]:
    """x (1 + scale) + shift, with one scale and one shift for an image."""
    scale, shift = modulation[:, :, None, None, None].swapaxes(0, 1)
    return x * (1 + scale) + shift


class CVss(nn.Module):
    """The block over (B X Y D) for `kinds` of images, of scans over `expand` D channels.

    `state` and `rank` as in `core.selection`.
    """

    kinds: int = 4
    prompt_dim: int = 128
    expand: int = 2
    state: int = 16
    rank: int | None = None
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = c_vss

    @nn.compact
    def __call__(
        self, x: Float[Array, "B X Y D"], kind: Int[Array, "B"] | None = None
    ) -> Float[Array, "B X Y D"]:
        """`kind` is the number of each image's kind; None is 0 for all."""
        D, H = x.shape[-1], self.expand * x.shape[-1]
        dense = lambda width, name: layers.Dense(width, False, self.dtype, name=name)
        first, second = self._modulation(jnp.zeros(len(x), int) if kind is None else kind)
        x = modulate(x, first.astype(x.dtype))
        kernel = layers.Table((3, 3, H), nn.initializers.normal(1 / 3), name="kernel")()
        u = nn.silu(convolutions.depthwise_conv(dense(H, "up")(x), kernel[None]))
        weights = selection.Selection(4, H, self.state, self.rank, name="selection")()
        gain = layers.Table((H,), nn.initializers.ones, name="gain")()
        offset = layers.Table((H,), nn.initializers.zeros, name="offset")()
        y = layers.Attend(self.fn, name="attend")(u, second, *weights, gain, offset)
        return dense(D, "down")(y * nn.silu(dense(H, "gate")(x)))

    def _modulation(self, kind):
        """Scale and shift, before the scans and after."""
        init = nn.initializers.normal(1.0)
        prompt = layers.Table((self.kinds, self.prompt_dim), init, name="prompts")()[kind]
        hidden = nn.gelu(layers.Dense(self.prompt_dim, name="prompt_in")(prompt))
        return jnp.split(layers.Dense(4, name="prompt_out")(hidden), 2, -1)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 9)
    return dict(
        u=jax.random.normal(keys[0], (2, T, 3, 4)),
        modulation=jax.random.normal(keys[1], (2, 2)),
        select=jax.random.normal(keys[2], (4, 4, 7)) / 2,
        widen=jax.random.normal(keys[3], (4, 1, 4)),
        bias=jax.random.normal(keys[4], (4, 4)) - 1,
        log_rate=jax.random.normal(keys[5], (4, 4, 3)),
        skip=jax.random.normal(keys[6], (4, 4)),
        gain=jax.random.normal(keys[7], (4,)),
        offset=jax.random.normal(keys[8], (4,)),
    )


def _oracle(u, modulation, select, widen, bias, log_rate, skip, gain, offset):
    y = ops.slow_ss2d(u, select, widen, bias, log_rate, skip)
    y = (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-6)
    y = y * gain[None, None, None] + offset[None, None, None]
    images = [z * (1 + m[0]) + m[1] for z, m in zip(y, modulation, strict=True)]
    return jnp.stack(images)


SPEC = registry.Mechanism(
    fn=c_vss,
    module=CVss,
    layout="grid",
    small=dict(kinds=2, prompt_dim=8, expand=1, state=4, rank=2),
    papers=("sum",),
    example=_example,
    oracle=_oracle,
    claims=frozenset({Claim.LINEAR_MEMORY, Claim.LINEAR_COMPUTE, Claim.FUSED, Claim.FORWARD_MODE}),
)
