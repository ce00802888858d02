r"""Bi-level routing attention: a region of an image attends to the few regions most like it.

Paper: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention",
arXiv:2303.08810, section 3.2, eqs. 2 to 7.

    a_rs = (mean_{t in region r} q_t) . (mean_{u in region s} k_u)     heads side by side
    o_t  = attention of q_t to the tokens of the topk regions of highest a_rs, r being t's region
    y_t  = o_t + sum_p kernel_p v_{t + p}                              over the p of a small square

The grid is cut into regions times regions rectangles. Regions are chosen for all heads together,
without a gradient, and their tokens gathered, so that attention is a dense product for each region.
Where topk is the number of regions this is full attention with a convolution of the values. With a
region of about (X Y)^(1/3) tokens, the cost is O((X Y)^(4/3)).

Shapes: B batch, X Y image axes, N heads, H head dim, V value dim, D model dim, P sides of the
kernel, R regions, A = topk regions of a region, C tokens of a region.
Unlike the paper: a grid that can't be cut evenly is filled up with tokens that nobody sees and that
count in no mean; scores are divided by the root of H, not of all heads' H; no biases.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import layers, masks, registry
from attnjax.ops import block_selection, depthwise_conv
from attnjax.ops import dot_product_attention as ops


def biformer(
    q: Float[Array, "B X Y N H"],
    k: Float[Array, "B X Y N H"],
    v: Float[Array, "B X Y N V"],
    kernel: Float[Array, "P P N V"] | None = None,
    *,
    regions: int = 7,
    topk: int = 4,
) -> Float[Array, "B X Y N V"]:
    """y in v's dtype.

    Args:
      kernel: of the convolution of the values, with odd sides; None is none.
      regions: into which each axis is cut at most.
      topk: regions that a region attends to; more than there are is all.

    Raises ValueError for regions or topk below 1, and for q, k and v of different grids.
    """
    if regions < 1 or topk < 1:
        raise ValueError(f"{regions=} and {topk=} must be at least 1")
    shape = q.shape[1:3]
    if not shape == k.shape[1:3] == v.shape[1:3]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} must be of the same grid")
    cut = functools.partial(_cut, sides=[-(-size // regions) for size in shape])
    real = cut(np.ones((1, *shape), bool))
    chosen = _route(cut(q), cut(k), real, topk)
    seen = jnp.broadcast_to(real, (len(q), *real.shape[1:]))
    gather = lambda x: jax.vmap(lambda x, at: x[at].reshape(len(at), -1, *x.shape[2:]))(x, chosen)
    attend = lambda q, k, v, seen: ops.dot_product_attention(q, k, v, mask=masks.Valid(seen))
    o = jax.vmap(attend, 1, 1)(cut(q), *(gather(x) for x in (cut(k), cut(v), seen)))
    o = _join(o, shape, regions)
    return o if kernel is None else o + depthwise_conv.depthwise_conv(v, kernel[None])


def _cut(x, sides):
    """(B X Y ...) -> (B R C ...), filled up with zeros at the end of each axis."""
    (B, X, Y, *rest), (P, Q) = x.shape, sides
    x = jnp.pad(x, ((0, 0), (0, -X % P), (0, -Y % Q), *((0, 0) for _ in rest)))
    x = x.reshape(B, x.shape[1] // P, P, x.shape[2] // Q, Q, *rest)
    return x.swapaxes(2, 3).reshape(B, -1, P * Q, *rest)


def _join(x, shape, regions):
    """The inverse of `_cut`."""
    B, _, _, *rest = x.shape
    P, Q = (-(-size // regions) for size in shape)
    rows, columns = -(-shape[0] // P), -(-shape[1] // Q)
    x = x.reshape(B, rows, columns, P, Q, *rest).swapaxes(2, 3)
    return x.reshape(B, rows * P, columns * Q, *rest)[:, : shape[0], : shape[1]]


def _route(q, k, real, topk):
    """Regions (B R A) of highest a, for q and k (B R C N H)."""
    B, R, C = q.shape[:3]
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
    seen = jnp.broadcast_to(flat(real), (B, R * C))
    means = (block_selection.means(flat(x), C, seen) for x in (q, k))
    return jax.lax.top_k(jnp.einsum("BRNH,BSNH->BRS", *means), min(topk, R))[1]


class BiFormer(nn.Module):
    """Section 3.2 over (B X Y D), with a convolution of the values by 5 times 5."""

    num_heads: int
    head_dim: int
    regions: int = 7
    topk: int = 4
    kernel_size: int = 5
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = biformer

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y D"]) -> Float[Array, "B X Y D"]:
        """Attention of each token to the regions that its own chooses."""
        N, H, P = self.num_heads, self.head_dim, self.kernel_size
        heads = functools.partial(layers.HeadProjection, N, H, self.dtype)
        q, k, v = (heads(name=name)(x) for name in ("query", "key", "value"))
        kernel = layers.Table((P, P, N, H), name="local")()
        attend = layers.Attend(self.fn, name="attend")
        o = attend(q, k, v, kernel, regions=self.regions, topk=self.topk)
        return layers.OutputProjection(self.dtype, name="out")(o, x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 6, 2, 4))
    return dict(q=q, k=k, v=v, kernel=jax.random.normal(key, (3, 3, 2, 4)))


def _oracle(q, k, v, kernel, *, regions=7, topk=4):
    B, X, Y, N, V = v.shape
    x, y = jnp.divmod(jnp.arange(X * Y), Y)
    region = x // -(-X // regions) * regions + y // -(-Y // regions)
    member = (region[None] == jnp.arange(regions**2)[:, None]).astype(jnp.float32)
    count = member.sum(-1)
    mean = member / jnp.maximum(count, 1)[:, None]
    flat = lambda x: x.reshape(B, X * Y, N, -1)
    q, k, u = flat(q), flat(k), flat(v)
    a = jnp.einsum("RT,BTNH,SU,BUNH->BRS", mean, q, mean, k)
    a = jnp.where((count > 0)[None, None], a, -jnp.inf)
    chosen = (a[..., None, :] > a[..., :, None]).sum(-1) < topk
    seen = chosen[:, None, region][..., region]
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    w = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf))
    o = jnp.einsum("BNTS,BSNV->BTNV", w, u).reshape(v.shape)
    image = v.reshape(B, X, Y, N * V)
    taps = kernel.reshape(*kernel.shape[:2], 1, N * V).astype(v.dtype)
    layout = ("NHWC", "HWIO", "NHWC")
    conv = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=layout)
    return o + conv(image, taps, (1, 1), "SAME", feature_group_count=N * V).reshape(v.shape)


SPEC = registry.Mechanism(
    fn=biformer,
    module=BiFormer,
    layout="grid",
    small=dict(num_heads=4, head_dim=8, regions=4, topk=2, kernel_size=3),
    papers=("biformer",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(regions=3, topk=2)),
    claims=frozenset({registry.Claim.FORWARD_MODE}),
)
