r"""SegMAN: attention to each cell's neighborhood, whose output is scanned over the whole image.

Paper: Fu, Lou and Yu, "SegMAN: Omni-scale Context Modeling with State Space Models and Local
Attention for Semantic Segmentation", arXiv:2412.11890, section 3.1 (LASS).

    r = neighborhood_attention(q, k, v)                         near cells, one by one
    s = gain * layer_norm(ss2d(silu(conv_3x3(r))))              all cells, in a state
    y = P_o (r + s + conv_5x5(v))                               the last encodes positions (LePE)

ss2d sums selective scans along four routes, as in VMamba (`ops.cross_scan`). So the scan, whose
state blurs details, need not carry them, and the attention, which is linear as its windows are of
one size, need not see far.

Shapes: B batch, X Y image axes, N heads, H head dim, G = N H channels, M entries of a channel's
state, R rank of the steps, F = R + 2M, D model dim.
Unlike the paper: no batch normalisation after the first convolution, so that nothing but parameters
is learned; no biases; q and k are rotated by `core.positions.rotary_grid`, of fewer slow angles.
The blocks of the last stage, with global attention in the place of the scan, and the decoder are
left out.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import layers, masks, positions, registry, selection
from attnjax.core.registry import Claim
from attnjax.ops import cross_scan as ops
from attnjax.ops import depthwise_conv as convolutions
from pallas_kernels import selective_scan as kernels


def segman(
    q: Float[Array, "B X Y N H"],
    k: Float[Array, "B X Y N H"],
    v: Float[Array, "B X Y N H"],
    kernel: Float[Array, "3 3 G"],
    select: Float[Array, "4 G F"],
    widen: Float[Array, "4 R G"],
    bias: Float[Array, "4 G"],
    log_rate: Float[Array, "4 G M"],
    skip: Float[Array, "4 G"],
    gain: Float[Array, "G"],
    lepe: Float[Array, "5 5 G"],
    *,
    window: int = 7,
    implementation: kernels.Implementation | None = "xla",
) -> Float[Array, "B X Y G"]:
    """r + s + conv_5x5(v) in v's dtype.

    Args:
      kernel, lepe: of the convolution before the scan, and of the one of the values.
      select, widen, bias, log_rate, skip: as in `ops.selective_scan.selected_scan`, for each route.
      window: cells that a query sees along an axis; inward at the border, and cut to the image.
      implementation: of the scans, as in `ops.selective_scan`.

    Raises ValueError for a window below 1 and for weights that don't fit each other.
    """
    near = registry.get("window.gna").fn(q, k, v, window=window)
    near, values = (x.reshape(*x.shape[:3], -1) for x in (near, v))
    u = jax.nn.silu(convolutions.depthwise_conv(near, kernel[None]))
    weights = select, widen, bias, log_rate, skip
    far = ops.ss2d(u, *weights, implementation=implementation).astype(jnp.float32)
    far = jax.nn.standardize(far, epsilon=1e-6) * gain[None, None, None]
    return near + far.astype(v.dtype) + convolutions.depthwise_conv(values, lepe[None])


class Segman(nn.Module):
    """LASS over (B X Y D): neighborhood attention of `window`, then scans with states of `state`.

    `state` and `rank` as in `core.selection`.
    """

    num_heads: int
    head_dim: int
    window: int = 7
    state: int = 1
    rank: int | None = None
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = segman

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y D"]) -> Float[Array, "B X Y D"]:
        """Each cell from all others. Raises ValueError where head_dim is no multiple of 4."""
        N, H = self.num_heads, self.head_dim
        q, k, v = (
            layers.HeadProjection(N, H, self.dtype, name=name)(x)
            for name in ("query", "key", "value")
        )
        table = lambda name, init, *shape: layers.Table((*shape, N * H), init, name=name)()
        weights = selection.Selection(4, N * H, self.state, self.rank, name="selection")()
        y = layers.Attend(self.fn, name="attend")(
            _rotated(q),
            _rotated(k),
            v,
            table("kernel", nn.initializers.normal(1 / 3), 3, 3),
            *weights,
            table("gain", nn.initializers.ones),
            table("lepe", nn.initializers.normal(1 / 5), 5, 5),
            window=self.window,
        )
        return layers.Dense(x.shape[-1], False, self.dtype, name="down")(y)


def _rotated(x):
    """Queries or keys rotated by their cells."""
    cells = jnp.asarray(positions.grid_coordinates(x.shape[1:3]), jnp.float32)
    flat = x.reshape(len(x), -1, *x.shape[3:])
    return positions.rotary_grid(flat, cells).reshape(x.shape)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
    return dict(
        q=draw(0, 2, T, 3, 2, 2),
        k=draw(1, 2, T, 3, 2, 2),
        v=draw(2, 2, T, 3, 2, 2),
        kernel=draw(3, 3, 3, 4) / 3,
        select=draw(4, 4, 4, 5) / 2,
        widen=draw(5, 4, 1, 4),
        bias=draw(6, 4, 4) - 1,
        log_rate=draw(7, 4, 4, 2),
        skip=draw(8, 4, 4),
        gain=draw(9, 4),
        lepe=draw(10, 5, 5, 4) / 5,
    )


def _oracle(q, k, v, kernel, select, widen, bias, log_rate, skip, gain, lepe, *, window=7):
    """Softmax over all cells, of which the mask leaves the window, and a walk token by token."""
    shape, (N, H) = q.shape[1:3], q.shape[3:]
    near = masks.Neighborhood(shape, tuple(min(window, L) for L in shape), (1, 1), (1, 1))
    q, k, o = (x.reshape(len(x), -1, N, H) for x in (q, k, v))
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(H)
    logits = jnp.where(masks.dense(near, *logits.shape[-2:]), logits, -1e30)
    r = jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(logits), o)
    r, v = (x.reshape(*v.shape[:3], N * H) for x in (r, v))
    s = ops.slow_ss2d(jax.nn.silu(_convolved(r, kernel)), select, widen, bias, log_rate, skip)
    s = (s - s.mean(-1, keepdims=True)) / jnp.sqrt(s.var(-1, keepdims=True) + 1e-6)
    return r + s * gain[None, None, None] + _convolved(v, lepe)


def _convolved(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    options = dict(dimension_numbers=layout, feature_group_count=x.shape[-1])
    return jax.lax.conv_general_dilated(x, kernel[:, :, None], (1, 1), "SAME", **options)


SPEC = registry.Mechanism(
    fn=segman,
    module=Segman,
    layout="grid",
    small=dict(num_heads=2, head_dim=8, window=3, rank=2),
    papers=("segman",),
    example=_example,
    oracle=_oracle,
    claims=frozenset({Claim.LINEAR_MEMORY, Claim.LINEAR_COMPUTE}),
)
