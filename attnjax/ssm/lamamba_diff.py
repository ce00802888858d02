r"""LaMamba-Diff: scans of a whole image, then attention in its windows, as a condition says.

Paper: Fu, Chen and Yu, "LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local
Attention and Mamba", arXiv:2408.02615, section 3.2.

    x <- x + gate_1 * mamba(layer_norm(x) * (1 + scale_1) + shift_1)
    x <- x + gate_2 * attend(layer_norm(x) * (1 + scale_2) + shift_2)

    mamba(x) = (layer_norm(ss2d(silu(conv_3x3(x U_1)))) * silu(x U_2)) down
    attend(x): in windows of W cells, with a bias by offset, and shifted in every other block (Swin)
    [shift_1, scale_1, gate_1, shift_2, scale_2, gate_2] = P silu(c)      c: time step and class

ss2d sums selective scans along four routes (`ops.cross_scan`), by default with turns at the ends of
lines. A state holds the whole image, but not its details; windows have these, and the cost of both
is linear.

Shapes: B batch, X Y image axes, N heads, H head dim, W cells of a window, G channels of the scans,
M entries of a channel's state, R rank of the steps, F = R + 2M, D model dim.
Unlike the paper: its third step, a multilayer perceptron with gate, scale and shift of its own, is
left to the model, as are the U-Net and the projection of c to D features. Norms have no weights of
their own beside the condition's, and projections no biases. Gates begin small, not at 0.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import layers, positions, registry, selection
from attnjax.core.registry import Claim
from attnjax.ops import cross_scan as ops
from attnjax.ops import depthwise_conv as convolutions
from pallas_kernels import selective_scan as kernels


def lamamba_diff(
    x: Float[Array, "B X Y D"],
    modulation: Float[Array, "B 6 D"],
    up: Float[Array, "2 D G"],
    kernel: Float[Array, "3 3 G"],
    select: Float[Array, "4 G F"],
    widen: Float[Array, "4 R G"],
    bias: Float[Array, "4 G"],
    log_rate: Float[Array, "4 G M"],
    skip: Float[Array, "4 G"],
    down: Float[Array, "G D"],
    qkv: Float[Array, "3 D N H"],
    offsets: Float[Array, "1 N W W"],
    merge: Float[Array, "N H D"],
    *,
    window: int = 8,
    shift: int = 0,
    pattern: ops.Pattern = "snake",
    implementation: kernels.Implementation | None = "xla",
) -> Float[Array, "B X Y D"]:
    """Both steps, in x's dtype.

    Args:
      modulation: shift, scale and gate of the first step, then of the second.
      up: to what is scanned, and to its gate.
      select, widen, bias, log_rate, skip: as in `ops.selective_scan.selected_scan`, for each route.
      offsets: bias of the scores of a query and a key by their cells of the window, in row order.
      window, shift: side of the windows, and their shift along both axes, less than `window`.
      pattern: of the routes.
      implementation: of the scans, as in `ops.selective_scan`.

    Raises ValueError for a shift or offsets that don't fit the window, and for weights that don't
    fit each other.
    """
    parts = jnp.split(modulation[:, :, None, None], 6, 1)
    first, second = ([part[:, 0] for part in half] for half in (parts[:3], parts[3:]))
    scan = select, widen, bias, log_rate, skip
    options = dict(pattern=pattern, implementation=implementation)
    x = _step(x, first, lambda y: _mamba(y, up, kernel, scan, down, options))
    return _step(x, second, lambda y: _attend(y, qkv, offsets, merge, window, shift))


def _step(x, modulation, layer):
    shift, scale, gate = (part.astype(jnp.float32) for part in modulation)
    y = layer((_layer_norm(x) * (1 + scale) + shift).astype(x.dtype))
    return (x.astype(jnp.float32) + gate * y.astype(jnp.float32)).astype(x.dtype)


def _layer_norm(x):
    return jax.nn.standardize(x.astype(jnp.float32), epsilon=1e-6)


def _mamba(x, up, kernel, scan, down, options):
    u, gate = jnp.einsum("BXYD,PDG->PBXYG", x, up.astype(x.dtype))
    u = jax.nn.silu(convolutions.depthwise_conv(u, kernel[None]))
    y = _layer_norm(ops.ss2d(u, *scan, **options)).astype(x.dtype)
    return jnp.einsum("BXYG,GD->BXYD", y * jax.nn.silu(gate), down.astype(x.dtype))


def _attend(x, qkv, offsets, merge, window, shift):
    q, k, v = jnp.einsum("BXYD,PDNH->PBXYNH", x, qkv.astype(x.dtype))
    attend = registry.get("window.swin").fn
    o = attend(q, k, v, offsets, window=window, shift=shift)
    return jnp.einsum("BXYNH,NHD->BXYD", o, merge.astype(x.dtype))


class LamambaDiff(nn.Module):
    """Both steps over (B X Y D), residuals included, for a condition of D features.

    Scans have `expand` D channels; `state` and `rank` as in `core.selection`, the other options as
    in `lamamba_diff`.
    """

    num_heads: int
    head_dim: int
    window: int = 8
    shift: int = 0
    pattern: ops.Pattern = "snake"
    expand: int = 2
    state: int = 16
    rank: int | None = None
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = lamamba_diff

    @nn.compact
    def __call__(
        self, x: Float[Array, "B X Y D"], condition: Float[Array, "B D"] | None = None
    ) -> Float[Array, "B X Y D"]:
        """`condition` None is a learned one, as for samples whose class is withheld."""
        D, G, N, H = x.shape[-1], self.expand * x.shape[-1], self.num_heads, self.head_dim
        none = layers.Table((D,), name="no_condition")()
        if condition is None:
            condition = jnp.broadcast_to(none[None], (len(x), D))
        modulation = layers.Dense(6 * D, dtype=self.dtype, name="modulation")(nn.silu(condition))
        many, wide = nn.initializers.lecun_normal(batch_axis=0), nn.initializers.normal(1 / 3)
        weights = selection.Selection(4, G, self.state, self.rank, name="selection")()
        return layers.Attend(self.fn, name="attend")(
            x if self.dtype is None else x.astype(self.dtype),
            modulation.reshape(-1, 6, D),
            layers.Table((2, D, G), many, name="up")(),
            layers.Table((3, 3, G), wide, name="kernel")(),
            *weights,
            layers.Table((G, D), nn.initializers.lecun_normal(), name="down")(),
            layers.Table((3, D, N, H), nn.initializers.normal(D**-0.5), name="qkv")(),
            positions.RelativeBias(N, (self.window,) * 2, name="offsets")(),
            layers.Table((N, H, D), nn.initializers.normal((N * H) ** -0.5), name="merge")(),
            window=self.window,
            shift=self.shift,
            pattern=self.pattern,
        )


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
    return dict(
        x=draw(0, 2, T, 3, 4),
        modulation=draw(1, 2, 6, 4) / 2,
        up=draw(2, 2, 4, 4) / 2,
        kernel=draw(3, 3, 3, 4) / 3,
        select=draw(4, 4, 4, 5) / 2,
        widen=draw(5, 4, 1, 4),
        bias=draw(6, 4, 4) - 1,
        log_rate=draw(7, 4, 4, 2),
        skip=draw(8, 4, 4),
        down=draw(9, 4, 4) / 2,
        qkv=draw(10, 3, 4, 2, 3) / 2,
        offsets=draw(11, 1, 2, 64, 64),
        merge=draw(12, 2, 3, 4) / 2,
    )


def _oracle(
    x,
    modulation,
    up,
    kernel,
    select,
    widen,
    bias,
    log_rate,
    skip,
    down,
    qkv,
    offsets,
    merge,
    *,
    window=8,
    shift=0,
    pattern="snake",
):
    """Token by token, and with softmax over all cells, of which the mask leaves the window."""
    m = [part[:, None, None] for part in jnp.moveaxis(modulation, 1, 0)]
    norm = lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    y = norm(x) * (1 + m[1]) + m[0]
    layout = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=kernel.shape[-1])
    u = jax.lax.conv_general_dilated(y @ up[0], kernel[:, :, None], (1, 1), "SAME", **layout)
    scan, snake = (select, widen, bias, log_rate, skip), pattern == "snake"
    u = norm(ops.slow_ss2d(jax.nn.silu(u), *scan, snake=snake)) * jax.nn.silu(y @ up[1])
    x = x + m[2] * (u @ down)
    y = norm(x) * (1 + m[4]) + m[3]
    at = positions.grid_coordinates(x.shape[1:3])
    at = at - np.array([[shift if size > window else 0 for size in x.shape[1:3]]])
    same = (at[:, None] // window == at[None] // window).all(-1)
    cell = at[:, 0] % window * window + at[:, 1] % window
    q, k, v = jnp.einsum("BTD,PDNH->PBTNH", y.reshape(len(x), -1, x.shape[-1]), qkv)
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    logits = jnp.where(same[None, None], logits + offsets[:, :, cell][..., cell], -1e30)
    o = jnp.einsum("BNTS,BSNH,NHD->BTD", jax.nn.softmax(logits), v, merge)
    return x + m[5] * o.reshape(x.shape)


SPEC = registry.Mechanism(
    fn=lamamba_diff,
    module=LamambaDiff,
    layout="grid",
    small=dict(num_heads=2, head_dim=8, window=3, shift=1, expand=1, state=2, rank=2),
    papers=("lamamba-diff",),
    example=_example,
    oracle=_oracle,
    variants=(dict(shift=3, pattern="raster"),),
    claims=frozenset({Claim.LINEAR_MEMORY, Claim.LINEAR_COMPUTE}),
)
