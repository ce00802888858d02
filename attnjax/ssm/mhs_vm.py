r"""MHS-VM: heads scan an image along routes of their own, and weigh where the routes differ.

Paper: Ji, "MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba", arXiv:2406.05992,
section 3.

    x_n  = silu(conv_3x3(x)) P_n                                a subspace for each head
    y_nj = selective scan of x_n along the route j = 1..4 of the pattern of head n
    a_n  = relu(std_j y_nj / (mean_j (y_nj - min_j y_nj) + 1e-5) - threshold)
    y    = layer_norm([a_n sum_j y_nj]_n) P_o

a_n, scan route attention, is a coefficient of variation for each cell and channel, std being that
of a sample. Where all routes agree it is 0. Elsewhere, up to the 1e-5, it is between 2/3 (one route
is below three that agree) and 2 (one is above three), whatever the routes' scale and offset: so a
threshold below 2/3 closes it nowhere, and one of 2 everywhere.

Shapes: B batch, X Y image axes, N heads, H channels of a head, J = 4N routes, M entries of a
channel's state, R rank of the steps, F = R + 2M, D model dim.
Unlike the paper: the convolution and the projection of the whole have no biases.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import layers, registry, selection
from attnjax.core.registry import Claim
from attnjax.ops import cross_scan as ops
from attnjax.ops import depthwise_conv as convolutions
from pallas_kernels import selective_scan as kernels

PATTERNS = ("snake", "diagonal", "spiral")


def mhs_vm(
    x: Float[Array, "B X Y N H"],
    select: Float[Array, "J H F"],
    widen: Float[Array, "J R H"],
    bias: Float[Array, "J H"],
    log_rate: Float[Array, "J H M"],
    skip: Float[Array, "J H"],
    *,
    patterns: tuple[ops.Pattern, ...] = PATTERNS,
    threshold: float = 0.0,
    implementation: kernels.Implementation | None = "xla",
) -> Float[Array, "B X Y N H"]:
    """a_n sum_j y_nj, in x's dtype.

    Args:
      select, widen, bias, log_rate, skip: as in `ops.selective_scan.selected_scan`, for all routes;
        those of the first head come first.
      patterns: one for each head.
      implementation: of the scans, as in `ops.selective_scan`.

    Raises ValueError for patterns that are unknown or not as many as heads.
    """
    weights = select, widen, bias, log_rate, skip
    options = dict(patterns=patterns, implementation=implementation)
    y = ops.cross_scan(x.astype(jnp.float32), *weights, **options)
    return scan_route_attention(y, threshold=threshold).astype(x.dtype)


def scan_route_attention(
    y: Float[Array, "*B J H"], *, threshold: float = 0.0
) -> Float[Array, "*B H"]:
    """a sum_j y_j, with gradient 0 where the routes agree."""
    variance = y.var(-2, ddof=1)
    agree = variance == 0
    deviation = jnp.where(agree, 0, jnp.sqrt(jnp.where(agree, 1, variance)))
    above = (y - y.min(-2, keepdims=True)).mean(-2)
    return y.sum(-2) * jax.nn.relu(deviation / (above + 1e-5) - threshold)


class MhsVm(nn.Module):
    """Multi-head scans over (B X Y D): a head for each of `patterns`; head_dim None is D / N.

    `threshold` as in `mhs_vm`, `state` and `rank` as in `core.selection`.
    """

    patterns: tuple[ops.Pattern, ...] = PATTERNS
    head_dim: int | None = None
    threshold: float = 0.0
    state: int = 16
    rank: int | None = None
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = mhs_vm

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y D"]) -> Float[Array, "B X Y D"]:
        """Each cell from all others. Raises ValueError where D is less than the heads."""
        D, N = x.shape[-1], len(self.patterns)
        H = D // N if self.head_dim is None else self.head_dim
        if H < 1:
            raise ValueError(f"{D=} must be at least the {N} heads of patterns={self.patterns}")
        kernel = layers.Table((3, 3, D), nn.initializers.normal(1 / 3), name="kernel")()
        u = nn.silu(convolutions.depthwise_conv(x, kernel[None]))
        u = layers.HeadProjection(N, H, self.dtype, name="subspaces")(u)
        weights = selection.Selection(ops.ROUTES * N, H, self.state, self.rank, name="selection")()
        options = dict(patterns=self.patterns, threshold=self.threshold)
        y = layers.Attend(self.fn, name="attend")(u, *weights, **options)
        heads = dict(reduction_axes=(-2, -1), feature_axes=(-2, -1))
        y = nn.LayerNorm(**heads, dtype=self.dtype, name="norm")(y)
        return layers.OutputProjection(self.dtype, name="out")(y, D)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 6)
    return dict(
        x=jax.random.normal(keys[0], (2, T, 3, 3, 4)),
        select=jax.random.normal(keys[1], (12, 4, 5)) / 2,
        widen=jax.random.normal(keys[2], (12, 1, 4)),
        bias=jax.random.normal(keys[3], (12, 4)) - 1,
        log_rate=jax.random.normal(keys[4], (12, 4, 2)),
        skip=jax.random.normal(keys[5], (12, 4)),
    )


def _oracle(x, select, widen, bias, log_rate, skip, *, patterns=PATTERNS, threshold=0.0):
    """Token by token; the routes themselves are judged by tests/ops/cross_scan_test.py."""
    B, X, Y, N, H = x.shape
    orders = np.stack([ops.routes(pattern, X, Y) for pattern in patterns])
    weights = [w.reshape(N, 4, *w.shape[1:]) for w in (select, widen, bias, log_rate, skip)]
    routes = jax.vmap(ops.walk, (None, *[0] * 6))
    y = jax.vmap(routes, (2, *[0] * 6))(x.reshape(B, X * Y, N, H), orders, *weights)  # N 4 B T H
    variation = y.std(1, ddof=1) / (jnp.mean(y - y.min(1, keepdims=True), 1) + 1e-5)
    y = y.sum(1) * jnp.maximum(variation - threshold, 0)
    return jnp.moveaxis(y, 0, 2).reshape(x.shape)


SPEC = registry.Mechanism(
    fn=mhs_vm,
    module=MhsVm,
    layout="grid",
    small=dict(state=4, rank=2),
    papers=("mhs-vm",),
    example=_example,
    oracle=_oracle,
    variants=(dict(patterns=("raster", "snake", "spiral"), threshold=1.0),),
    claims=frozenset({Claim.LINEAR_MEMORY, Claim.LINEAR_COMPUTE, Claim.FUSED, Claim.FORWARD_MODE}),
)
