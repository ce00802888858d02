r"""Res-VMamba: selective scans over an image along four routes (SS2D), beside a linear residual.

Paper: Chen et al., "Res-VMamba: Fine-Grained Food Category Visual Classification Using Selective
State Space Models with Deep Residual Learning", arXiv:2402.15761, section 3; SS2D as in Liu et al.,
"VMamba: Visual State Space Model", arXiv:2401.10166, section 4.3.

    y = P_o (layer_norm(ss2d(u)) * silu(P_z x)) + P_r x,       u = silu(conv_3x3(P_u x))

    ss2d(u)_p = sum_j y^j_t    where route j visits cell p as its t-th, and along it, from h_0 = 0,
    h_t = exp(delta_t rate) h_{t-1} + delta_t u_t b_t,         y_t = h_t . c_t + skip u_t
    [r_t, b_t, c_t] = u_t select,                              delta_t = softplus(r_t widen + bias)

j is one of: by rows, by columns, and each of them backwards; rate = -exp(log_rate). P_r x is the
residual that the paper adds to VMamba.

Shapes: B batch, X Y image axes, H channels of the scans, M entries of a channel's state, R rank of
the steps, F = R + 2M, D model dim.
Unlike the paper: the residual goes around one layer; the paper's goes around a stage, through a
max-pooling that follows the stage's halving of the image. P_r is learned, where the authors' code
draws another one each time it runs. Neither projections nor the convolution have biases.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import layers, registry, selection
from attnjax.core.registry import Claim
from attnjax.ops import cross_scan as ops
from attnjax.ops import depthwise_conv as convolutions
from pallas_kernels import selective_scan as kernels


def res_vmamba(
    u: Float[Array, "B X Y H"],
    select: Float[Array, "4 H F"],
    widen: Float[Array, "4 R H"],
    bias: Float[Array, "4 H"],
    log_rate: Float[Array, "4 H M"],
    skip: Float[Array, "4 H"],
    *,
    implementation: kernels.Implementation | None = "xla",
) -> Float[Array, "B X Y H"]:
    """ss2d(u) in u's dtype; routes in the order rows, columns, rows and columns backwards.

    Args:
      implementation: of the scans, as in `ops.selective_scan`.

    Raises ValueError for weights that don't fit each other.
    """
    weights = select, widen, bias, log_rate, skip
    return ops.ss2d(u, *weights, implementation=implementation)


class ResVmamba(nn.Module):
    """SS2D and the residual over (B X Y D): scans of `expand` D channels with states of `state`."""

    expand: int = 2
    state: int = 16
    rank: int | None = None
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = res_vmamba

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y D"]) -> Float[Array, "B X Y D"]:
        """Each cell from all others; options as in `core.selection`."""
        D = x.shape[-1]
        dense = lambda width, name: layers.Dense(width, False, self.dtype, name=name)
        H = self.expand * D
        kernel = layers.Table((3, 3, H), nn.initializers.normal(1 / 3), name="kernel")()
        u = nn.silu(convolutions.depthwise_conv(dense(H, "up")(x), kernel[None]))
        weights = selection.Selection(4, H, self.state, self.rank, name="selection")()
        y = layers.Attend(self.fn, name="attend")(u, *weights)
        y = nn.LayerNorm(dtype=self.dtype, name="norm")(y) * nn.silu(dense(H, "gate")(x))
        return dense(D, "down")(y) + dense(D, "residual")(x)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 6)
    return dict(
        u=jax.random.normal(keys[0], (2, T, 3, 4)),
        select=jax.random.normal(keys[1], (4, 4, 7)) / 2,
        widen=jax.random.normal(keys[2], (4, 1, 4)),
        bias=jax.random.normal(keys[3], (4, 4)) - 1,
        log_rate=jax.random.normal(keys[4], (4, 4, 3)),
        skip=jax.random.normal(keys[5], (4, 4)),
    )


def _oracle(u, select, widen, bias, log_rate, skip):
    return ops.slow_ss2d(u, select, widen, bias, log_rate, skip)


SPEC = registry.Mechanism(
    fn=res_vmamba,
    module=ResVmamba,
    layout="grid",
    small=dict(state=4, rank=2),
    papers=("res-vmamba",),
    example=_example,
    oracle=_oracle,
    claims=frozenset({Claim.LINEAR_MEMORY, Claim.LINEAR_COMPUTE, Claim.FUSED, Claim.FORWARD_MODE}),
)
