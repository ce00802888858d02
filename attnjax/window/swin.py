r"""Swin: attention within the windows of a grid, whose borders shift from block to block.

Paper: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
arXiv:2103.14030, section 3.2, eqs. 3 and 4.

    window of (x, y)  =  (floor((x - shift) / M), floor((y - shift) / M))
    o = softmax(q k^T / sqrt(H) + bias) v      over the tokens of one window

bias depends on the offset of query and key. Blocks with shift 0 and floor(M / 2) alternate, so
that what one block keeps apart the next brings together. Shifted windows are cut at the border of
the grid; to have no more of them than without a shift, the grid is rolled by -shift, and tokens
that meet only through the roll don't see each other.

Shapes: B batch, X Y image axes, N heads, H head dim, V value dim, D model dim, M window, W = M^2.
Unlike the paper: a grid that is no multiple of M is padded with tokens that nobody sees; forbidden
pairs have weight zero instead of a logit lowered by 100; the projections have no biases.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import layers, positions, registry
from attnjax.core.registry import Claim
from attnjax.ops import neighborhood_attention as ops
from pallas_kernels import neighborhood as kernels


def swin(
    q: Float[Array, "B X Y N H"],
    k: Float[Array, "B X Y N H"],
    v: Float[Array, "B X Y N V"],
    bias: Float[Array, "1 N W W"],
    *,
    window: int = 7,
    shift: int = 0,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B X Y N V"]:
    """Eq. 4 within each window of `window` times `window` tokens.

    Args:
      bias: of a query and a key by their cells of the window, in row order.
      window: M.
      shift: of the windows along both axes, less than `window`. An axis that fits into one window
        is not shifted, as in the authors' code.
      implementation: as in `ops.neighborhood_attention`.

    Returns the output in v's dtype. Raises ValueError for a shift or a bias that doesn't fit, and
    for queries, keys and values of different grids.
    """
    if not 0 <= shift < window:
        raise ValueError(f"{shift=} must be at least 0 and less than {window=}")
    if bias.shape[-2:] != (window**2, window**2):
        raise ValueError(f"bias {bias.shape} must end in {(window**2, window**2)} for {window=}")
    shape = q.shape[1:3]
    if not shape == k.shape[1:3] == v.shape[1:3]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} must be of the same grid")
    shifts = tuple(shift if size > window else 0 for size in shape)
    cut = functools.partial(_cut, window=window, shifts=shifts)
    near = None
    if any(shifts) or any(size % window for size in shape):
        region = cut(_regions(shape, shifts), fill=-1)
        near = kernels.Near(region, region, region)
    options = dict(near=near, bias=bias, implementation=implementation)
    o = ops.neighborhood_attention(cut(q), cut(k), cut(v), **options)
    return _join(o, shape, window=window, shifts=shifts)


def _regions(shape, shifts):
    """(1 X Y) which tokens are rolled from the start of an axis to its end."""
    x, y = (np.arange(size) < shift for size, shift in zip(shape, shifts, strict=True))
    return (2 * x[:, None] + y[None, :])[None]


def _cut(x, *, window, shifts, fill=0):
    """(B X Y ...) -> (B, windows, cells, ...), padded at the end with `fill` and rolled."""
    B, X, Y, *rest = x.shape
    pads = ((0, 0), (0, -X % window), (0, -Y % window), *((0, 0) for _ in rest))
    x = jnp.pad(x, pads, constant_values=fill)
    x = jnp.roll(x, [-shift for shift in shifts], (1, 2))
    x = x.reshape(B, x.shape[1] // window, window, x.shape[2] // window, window, *rest)
    return x.swapaxes(2, 3).reshape(B, -1, window**2, *rest)


def _join(x, shape, *, window, shifts):
    """The inverse of `_cut`."""
    B, _, _, *rest = x.shape
    rows, columns = (-(-size // window) for size in shape)
    x = x.reshape(B, rows, columns, window, window, *rest).swapaxes(2, 3)
    x = x.reshape(B, rows * window, columns * window, *rest)
    return jnp.roll(x, shifts, (1, 2))[:, : shape[0], : shape[1]]


class Swin(nn.Module):
    """Section 3.2 over (B X Y D): one of W-MSA (shift 0) and SW-MSA (shift floor(M / 2))."""

    num_heads: int
    head_dim: int
    window: int = 7
    shift: int = 0
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = swin

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y D"]) -> Float[Array, "B X Y D"]:
        """Attention of each token to those of its window."""
        heads = functools.partial(layers.HeadProjection, self.num_heads, self.head_dim, self.dtype)
        q, k, v = (heads(name=name)(x) for name in ("query", "key", "value"))
        bias = positions.RelativeBias(self.num_heads, (self.window,) * 2, name="bias")()
        attend = layers.Attend(self.fn, name="attend")
        o = attend(q, k, v, bias, window=self.window, shift=self.shift)
        return layers.OutputProjection(self.dtype, name="out")(o, x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 8, 2, 4))
    return dict(q=q, k=k, v=v, bias=jax.random.normal(key, (1, 2, 49, 49)))


def _oracle(q, k, v, bias, *, window=7, shift=0):
    at = np.indices(q.shape[1:3]).reshape(2, -1)
    at = at - np.array([[shift if size > window else 0] for size in q.shape[1:3]])
    same = (at[:, :, None] // window == at[:, None, :] // window).all(0)
    cell = at[0] % window * window + at[1] % window
    q, k, o = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (q, k, v))
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    logits = jnp.where(same[None, None], logits + bias[:, :, cell][..., cell], -jnp.inf)
    return jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(logits), o).reshape(v.shape)


SPEC = registry.Mechanism(
    fn=swin,
    module=Swin,
    layout="grid",
    small=dict(num_heads=4, head_dim=8, window=3, shift=1),
    papers=("swin",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(shift=3)),
    claims=frozenset(
        {
            Claim.LINEAR_MEMORY,
            Claim.LINEAR_COMPUTE,
            Claim.FUSED,
            Claim.DENSE_TWIN,
            Claim.CONTEXT_PARALLEL,
        }
    ),
    context=("halo",),
)
