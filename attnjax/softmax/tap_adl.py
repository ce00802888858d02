r"""TAP and ADL: attention reads local means of the tokens, and is told apart between queries.

Paper: Guo et al., "Robustifying Token Attention for Vision Transformers", arXiv:2303.11126:
Token-aware Average Pooling and the Attention Diversification Loss, both as in the authors' code.

    z_xy = sum_i softmax_i(m_xy) mean_i(x)_xy                i = 0 ... I-1,   m = conv(conv(x))
    y    = multi-head attention of norm(z)
    loss = mean_t cos(cut(A_t), cut(mean_t A_t)),            cut(a) = a where a > 2 / S, else 0

mean_0 is the token itself, and mean_i that of the nine tokens 0 or i steps away along each axis,
counting 0 beyond the border. Each token so chooses how far it looks around, and no single one can
take all attention with the noise that is in it. A is the map of a layer, its mean over heads. The
loss, a mean over layers, is high where many queries look at the same few keys. It needs the maps:

    y, maps = edit.read(model.apply, where="*/attention/attend")(params, images)
    adl = sum(map(diversification_loss, maps.values())) / len(maps)

Shapes: B batch, X Y image axes, D model dim, I pools, T queries, S keys, N heads, H head dim.
Unlike the paper: no batch normalisation between the two convolutions, so the module holds no state.
Robustness to noise and blur is the paper's result at scale; the test shows that the loss spreads
attention.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import attention, layers, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops


def tap_adl(x: Float[Array, "B X Y D"], logits: Float[Array, "B X Y I"]) -> Float[Array, "B X Y D"]:
    """z in x's dtype, computed in float32; `logits` are m."""
    m = jax.nn.softmax(logits.astype(jnp.float32))
    pools = (_local_mean(x.astype(jnp.float32), i) for i in range(m.shape[-1]))
    return sum(m[..., i, None] * pool for i, pool in enumerate(pools)).astype(x.dtype)


def _local_mean(x, steps):
    """mean_i, along one axis after the other."""
    for axis in (1, 2) if steps else ():
        length = x.shape[axis]
        border = [(steps, steps) if i == axis else (0, 0) for i in range(x.ndim)]
        padded = jnp.pad(x, border)
        near = (
            jax.lax.slice_in_dim(padded, i * steps, i * steps + length, 1, axis) for i in (0, 1, 2)
        )
        x = sum(near) / 3
    return x


def diversification_loss(
    weights: Float[Array, "B N T S"], *, threshold: float = 2.0
) -> Float[Array, ""]:
    """The loss of one layer, from 0 to 1, in float32.

    threshold: of what counts as looking at a key, in units of equal weights. Above 1 it sets the
    mean of queries that look everywhere alike to 0, and the loss with it.
    """
    a = weights.astype(jnp.float32).mean(1)
    cut = lambda a: jnp.where(a > threshold / a.shape[-1], a, 0.0)
    rows, mean = cut(a), cut(a.mean(1, keepdims=True))
    # far less than any square that passes the threshold; it keeps the gradient of zeros finite
    length = lambda a: jnp.sqrt((a**2).sum(-1) + 1e-16)
    return ((rows * mean).sum(-1) / (length(rows) * length(mean))).mean()


class TapAdl(nn.Module):
    """Multi-head attention over (B X Y D) to tokens that TAP has pooled, by `num_pools` means."""

    num_heads: int
    head_dim: int
    num_pools: int = 4
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = tap_adl

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y D"]) -> Float[Array, "B X Y D"]:
        """The attention of a block, without its residual sum, for x before any norm."""
        if (I := self.num_pools) < 2:  # noqa: E741
            raise ValueError(f"num_pools={I} must be at least 2; 1 is attention without pooling")
        conv = lambda name, x: layers.Conv(I, (3, 3), None, False, self.dtype, name=name)(x)
        logits = conv("scales_out", conv("scales_in", x))
        z = layers.Attend(self.fn, name="pool")(x.astype(self.dtype or x.dtype), logits)
        z = nn.LayerNorm(dtype=self.dtype, name="norm")(z)
        attend = attention.KeyValueAttention(
            self.num_heads,
            self.head_dim,
            dtype=self.dtype,
            fn=ops.dot_product_attention,
            name="attention",
        )
        return attend(z.reshape(len(z), -1, z.shape[-1])).reshape(z.shape)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    x, logits = jax.random.split(key)
    return dict(
        x=jax.random.normal(x, (2, T, 5, 6)), logits=jax.random.normal(logits, (2, T, 5, 3))
    )


def _oracle(x, logits):
    def sums(length, steps):  # row t: the positions that are added up for t
        apart = jnp.abs(jnp.arange(length)[:, None] - jnp.arange(length)[None])
        return (apart == 0) | (apart == steps)

    z = x * jax.nn.softmax(logits)[..., :1]
    for i in range(1, logits.shape[-1]):
        rows, columns = (sums(length, i).astype(x.dtype) for length in x.shape[1:3])
        pool = jnp.einsum("XU,YV,BUVD->BXYD", rows, columns, x) / 9
        z += jax.nn.softmax(logits)[..., i, None] * pool
    return z


SPEC = registry.Mechanism(
    fn=tap_adl,
    module=TapAdl,
    layout="grid",
    small=dict(num_heads=4, head_dim=8, num_pools=3),
    papers=("tap-adl",),
    example=_example,
    oracle=_oracle,
    claims=frozenset({Claim.FORWARD_MODE}),
)
