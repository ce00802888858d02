r"""L2ViT: linear attention to the whole image, then convolutions that concentrate it.

Paper: Zheng, "The Linear Attention Resurrection in Vision Transformer", arXiv:2501.16182: linear
global attention and the local concentration module.

    o_t = tau sum_s relu(q_t) . relu(k_s) v_s / max(sum_s relu(q_t) . relu(k_s), 100)
    a   = P_o o,      y = a + conv(gelu(conv(norm(x + a))))

tau is learned for each head and begins as 1/sqrt(H). The bound of the normaliser keeps gradients
small where a query meets few keys. Weights of linear attention spread over the image; conv, with a
kernel of 7 by 7 for each channel, brings the neighbours of a token back into focus.

Shapes: B batch, X Y image axes, N heads, H head dim, V value dim, D model dim, P side of a kernel.
Unlike the paper: no batch normalisation between the convolutions, which at inference their kernels
can absorb, and no biases in them or in the projections. x + a is of this module's input, which the
model may have normalised. Left to the model: position encodings by convolution, and the blocks of
attention within windows (`window.swin` without a shift) that alternate with these.
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


def l2vit(
    q: Float[Array, "B X Y N H"],
    k: Float[Array, "B X Y N H"],
    v: Float[Array, "B X Y N V"],
    temperature: Float[Array, "N"],
    *,
    least: float = 100.0,
) -> Float[Array, "B X Y N V"]:
    """Linear global attention: o in v's dtype, computed in float32.

    Args:
      temperature: tau.
      least: bound of the normaliser from below.

    Raises ValueError for a bound that is not positive.
    """
    if least <= 0:
        raise ValueError(f"{least=} must be above 0")
    dtype = v.dtype
    q, k, v, temperature = (x.astype(jnp.float32) for x in (q, k, v, temperature))
    q, k = jax.nn.relu(q), jax.nn.relu(k)
    total = jnp.einsum("BXYNH,BNH->BXYN", q, k.sum((1, 2)))
    o = jnp.einsum("BXYNH,BNHV->BXYNV", q, jnp.einsum("BXYNH,BXYNV->BNHV", k, v))
    gain = temperature[None, None, None] / jnp.maximum(total, least)
    return (o * gain[..., None]).astype(dtype)


def local_concentration(
    x: Float[Array, "B X Y D"], first: Float[Array, "P P D"], second: Float[Array, "P P D"]
) -> Float[Array, "B X Y D"]:
    """conv(gelu(conv(x))), each channel by itself, in x's dtype."""
    hidden = nn.gelu(convolutions.depthwise_conv(x, first[None]))
    return convolutions.depthwise_conv(hidden, second[None])


class L2vit(nn.Module):
    """Linear global attention and local concentration over (B X Y D); `size` is that of kernels."""

    num_heads: int
    head_dim: int
    least: float = 100.0
    size: int = 7
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = l2vit

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y D"]) -> Float[Array, "B X Y D"]:
        """Attention of each position to all, and of its neighbours once more."""
        (N, H), D = (self.num_heads, self.head_dim), x.shape[-1]
        heads = functools.partial(layers.HeadProjection, N, H, self.dtype)
        q, k, v = (heads(name=name)(x) for name in ("query", "key", "value"))
        temperature = layers.Table((N,), nn.initializers.constant(H**-0.5), name="temperature")()
        o = layers.Attend(self.fn, name="attend")(q, k, v, temperature, least=self.least)
        o = layers.OutputProjection(self.dtype, name="out")(o, D)
        shape, init = (self.size, self.size, D), nn.initializers.normal(1 / self.size)
        kernels = (layers.Table(shape, init, name=name)() for name in ("first", "second"))
        return o + local_concentration(nn.LayerNorm(dtype=self.dtype, name="norm")(x + o), *kernels)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 3, 2, 8))
    return dict(q=q, k=k, v=v, temperature=jnp.array([0.3, 2.0]))


def _oracle(q, k, v, temperature, *, least=100.0):
    q, k = jnp.maximum(q, 0), jnp.maximum(k, 0)
    w = jnp.einsum("BXYNH,BxyNH->BNXYxy", q, k)
    w = w / jnp.clip(jnp.sum(w, (-2, -1), keepdims=True), least)
    return jnp.einsum("N,BNXYxy,BxyNV->BXYNV", temperature, w, v)


SPEC = registry.Mechanism(
    fn=l2vit,
    module=L2vit,
    layout="grid",
    small=dict(num_heads=4, head_dim=8, size=3),
    papers=("l2vit",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(least=1e-3)),
    claims=frozenset(
        {
            Claim.LINEAR_MEMORY,
            Claim.LINEAR_COMPUTE,
            Claim.DENSE_TWIN,
            Claim.FORWARD_MODE,
        }
    ),
)
