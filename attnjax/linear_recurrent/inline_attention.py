r"""InLine attention: linear attention normalised by subtraction, and a local term.

Paper: Han et al., "Bridging the Divide: Reconsidering Softmax and Linear Attention",
arXiv:2412.06590, eq. 5 (the linear form), and the local term.

    w_ts = z_ts - mean_s(z_ts) + 1/S,      z_ts = (q_t . k_s) / (sqrt(H) S)
    o_t  = sum_s w_ts v_s + conv(v)_t      conv: a kernel for each channel, by an MLP of mean(x)

Weights sum to 1 for each query and may be negative. Division makes linear attention blind to the
length of its features: a query and its double weigh the keys alike. Subtraction keeps all there is
to know (InLine: injective linear): queries that differ weigh the keys differently, if these span H
dimensions around their mean. Written out, the sum is an affine map of the query,

    sum_s w_ts v_s = mean(v) + q_t cov(k, v) / sqrt(H),

which is softmax attention to the first order in the scores.

Shapes: B batch, X Y image axes, S = X Y, N heads, H head dim, V value dim, D model dim, P Q sides
of the kernel.
Unlike the paper: the features are queries and keys themselves, the authors' default (others may be
applied to both before); the projections have no biases.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import layers, registry
from attnjax.core.registry import Claim
from attnjax.ops import depthwise_conv as convolutions


def inline_attention(
    q: Float[Array, "B X Y N H"],
    k: Float[Array, "B X Y N H"],
    v: Float[Array, "B X Y N V"],
    kernel: Float[Array, "B P Q N V"],
) -> Float[Array, "B X Y N V"]:
    """o in v's dtype, computed in float32; `kernel` is that of each image, with odd sides."""
    dtype, (q, k, v) = v.dtype, (x.astype(jnp.float32) for x in (q, k, v))
    mean = lambda x: x.mean((1, 2), keepdims=True)
    (X, Y), H = q.shape[1:3], q.shape[-1]
    covariance = jnp.einsum("BXYNH,BXYNV->BNHV", k - mean(k), v) / (X * Y * H**0.5)
    o = mean(v) + jnp.einsum("BXYNH,BNHV->BXYNV", q, covariance)
    return (o + convolutions.depthwise_conv(v, kernel)).astype(dtype)


class LocalKernel(nn.Module):
    """(B X Y D) -> a kernel of odd `size` for each image and channel: (B size size N H).

    An MLP of the image's mean, for each head by itself: a head sees D / N channels of it.
    """

    num_heads: int
    head_dim: int
    size: int

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y D"]) -> Float[Array, "B P Q N H"]:
        """In float32. Raises ValueError where D is no multiple of `num_heads`."""
        N, D, shape = self.num_heads, x.shape[-1], (self.size, self.size)
        if D % N:
            raise ValueError(f"{D=} must be a multiple of num_heads={N}")
        F = D // N
        pooled = x.astype(jnp.float32).mean((1, 2)).reshape(-1, N, F)
        init = nn.initializers.normal(F**-0.5)
        hidden = layers.Table((N, F, F), init, name="hidden")()
        weights = layers.Table((N, F, *shape, self.head_dim), init, name="weights")()
        base = layers.Table((*shape, N, self.head_dim), init, name="base")()
        pooled = nn.gelu(jnp.einsum("BNF,NFG->BNG", pooled, hidden))
        return jnp.einsum("BNF,NFPQH->BPQNH", pooled, weights) + base[None]


class InlineAttention(nn.Module):
    """Multi-head InLine attention over (B X Y D); `size` is the side of the local kernels."""

    num_heads: int
    head_dim: int
    size: int = 3
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = inline_attention

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y D"]) -> Float[Array, "B X Y D"]:
        """Attention of each position to all. Raises ValueError as `LocalKernel`."""
        N, H = self.num_heads, self.head_dim
        heads = functools.partial(layers.HeadProjection, N, H, self.dtype)
        q, k, v = (heads(name=name)(x) for name in ("query", "key", "value"))
        kernel = LocalKernel(N, H, self.size, name="kernel")(x)
        o = layers.Attend(self.fn, name="attend")(q, k, v, kernel)
        return layers.OutputProjection(self.dtype, name="out")(o, x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 3, 2, 4))
    return dict(q=q, k=k, v=v, kernel=jax.random.normal(key, (2, 3, 3, 2, 4)) / 3)


def _oracle(q, k, v, kernel):
    B, X, Y, N, V = v.shape
    z = jnp.einsum("BXYNH,BxyNH->BNXYxy", q, k) / (jnp.sqrt(q.shape[-1]) * X * Y)
    w = z - jnp.mean(z, (-2, -1), keepdims=True) + 1 / (X * Y)
    options = dict(padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    convolve = lambda image, kernel: jax.lax.conv_general_dilated(
        image.reshape(1, X, Y, N * V),
        kernel.reshape(*kernel.shape[:2], 1, N * V),
        (1, 1),
        feature_group_count=N * V,
        **options,
    )
    local = jax.vmap(convolve)(v, kernel).reshape(v.shape)
    return jnp.einsum("BNXYxy,BxyNV->BXYNV", w, v) + local


SPEC = registry.Mechanism(
    fn=inline_attention,
    module=InlineAttention,
    layout="grid",
    small=dict(num_heads=4, head_dim=8),
    papers=("inline-attention",),
    example=_example,
    oracle=_oracle,
    claims=frozenset({Claim.LINEAR_MEMORY, Claim.LINEAR_COMPUTE, Claim.FORWARD_MODE}),
)
