r"""Set Transformer: attention blocks over a set, and its pooling by learned queries.

Paper: Lee et al., "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural
Networks", arXiv:1810.00825, sections 2.1 (heads) and 3 (blocks).

    head_n(X, Y)   = softmax(Q_n K_n^T / sqrt(N H)) V_n         Q = X W_q,  K = Y W_k,  V = Y W_v
    MAB(X, Y)      = norm(A + rFF(A)),      A = norm(X + sum_n head_n(X, Y) W_o,n)
    SAB(X)         = MAB(X, X)
    ISAB(X)        = MAB(X, MAB(I, X))      I: learned inducing points; cost linear in the set
    PMA(X)         = MAB(P, rFF(X))         P: M learned seeds, one for each output
    Set Transformer: PMA over SABs or ISABs, then SABs over the M outputs

The scale is by the model's width N H, not by that of a head.
Shapes: B batch, T queries, S elements, M seeds, N heads, H head dim, V value dim, D model dim.
Unlike the paper: the projections have no biases, and the last rFF is left to the model. rFF is
one layer with a ReLU, as in the authors' code.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import layers, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops

Set = Float[Array, "B S D"]
Outputs = Float[Array, "B M D"]


def set_transformer(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N V"],
    *,
    mask: masks.Mask | None = None,
    score_mod: Callable[..., jax.Array] | None = None,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """The attention inside every block, with scale 1/sqrt(N H); `mask` may be Valid.

    Other options: `ops.dot_product_attention`. Raises NotImplementedError for another mask:
    elements of a set have no positions.
    """
    masks.select(mask, masks.Valid, by="set_transformer")
    scale = (q.shape[2] * q.shape[3]) ** -0.5
    attend = functools.partial(ops.dot_product_attention, implementation=implementation)
    return attend(q, k, v, mask=mask, scale=scale, score_mod=score_mod)


class _Block(nn.Module):
    """The options that all blocks share."""

    num_heads: int
    head_dim: int
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = set_transformer

    def _make(self, block, name, **options):
        shared = dict(num_heads=self.num_heads, head_dim=self.head_dim, dtype=self.dtype)
        return block(**shared, **options, fn=self.fn, name=name)

    def _learned(self, count, x, name):
        table = layers.Table((count, x.shape[-1]), nn.initializers.glorot_uniform(), name=name)()
        return jnp.broadcast_to(table[None], (x.shape[0], *table.shape))


class MAB(_Block):
    """Multihead attention block: every x looks at the elements of y."""

    @nn.compact
    def __call__(
        self, x: Outputs, y: Float[Array, "B S F"], *, mask: masks.Mask | None = None
    ) -> Outputs:
        """`mask` says which elements of y are valid."""
        D = x.shape[-1]
        heads = functools.partial(layers.HeadProjection, self.num_heads, self.head_dim, self.dtype)
        q, k, v = heads(name="query")(x), heads(name="key")(y), heads(name="value")(y)
        o = layers.Attend(self.fn, name="attend")(q, k, v, mask=mask)
        x = x + layers.OutputProjection(self.dtype, name="out")(o, D)
        x = nn.LayerNorm(dtype=self.dtype, name="attended_norm")(x)
        x = x + nn.relu(layers.Dense(D, dtype=self.dtype, name="feedforward")(x))
        return nn.LayerNorm(dtype=self.dtype, name="norm")(x)


class SAB(_Block):
    """Set attention block: (B S D) to itself, at a cost quadratic in S."""

    @nn.compact
    def __call__(self, x: Set, *, mask: masks.Mask | None = None) -> Set:
        """The output of an element that is not valid means nothing."""
        return self._make(MAB, "mab")(x, x, mask=mask)


class ISAB(_Block):
    """Induced set attention block: (B S D) to itself through `num_inducing` learned points."""

    num_inducing: int = 16

    @nn.compact
    def __call__(self, x: Set, *, mask: masks.Mask | None = None) -> Set:
        """The output of an element that is not valid means nothing."""
        inducing = self._learned(self.num_inducing, x, "inducing")
        summary = self._make(MAB, "gather")(inducing, x, mask=mask)
        return self._make(MAB, "spread")(x, summary)


class PMA(_Block):
    """Pooling by multihead attention: (B S D) -> (B num_seeds D)."""

    num_seeds: int = 1

    @nn.compact
    def __call__(self, x: Set, *, mask: masks.Mask | None = None) -> Outputs:
        """`mask` says which elements are valid."""
        seeds = self._learned(self.num_seeds, x, "seeds")
        x = nn.relu(layers.Dense(x.shape[-1], dtype=self.dtype, name="feedforward")(x))
        return self._make(MAB, "mab")(seeds, x, mask=mask)


class SetTransformer(_Block):
    """Encoder and pooling: (B S D) -> (B num_seeds D).

    num_inducing None encodes by SABs, else by ISABs. `decoder_blocks` SABs follow the pooling;
    over a single seed they would have nothing to attend to.
    """

    num_seeds: int = 1
    num_inducing: int | None = 16
    encoder_blocks: int = 2
    decoder_blocks: int = 0

    @nn.compact
    def __call__(self, x: Set, *, mask: masks.Mask | None = None) -> Outputs:
        """`mask` says which elements are valid; ValueError for a decoder of a single seed."""
        if self.decoder_blocks and self.num_seeds == 1:
            raise ValueError(f"decoder_blocks={self.decoder_blocks} must be 0 with num_seeds=1")
        induced = {} if self.num_inducing is None else dict(num_inducing=self.num_inducing)
        for i in range(self.encoder_blocks):
            x = self._make(ISAB if induced else SAB, f"encoder_{i}", **induced)(x, mask=mask)
        x = self._make(PMA, "pool", num_seeds=self.num_seeds)(x, mask=mask)
        for i in range(self.decoder_blocks):
            x = self._make(SAB, f"decoder_{i}")(x)
        return x


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    seeds, elements = jax.random.split(key)
    k, v = jax.random.normal(elements, (2, 2, T, 4, 8))
    return dict(q=jax.random.normal(seeds, (2, 6, 4, 8)), k=k, v=v)


def _oracle(q, k, v):
    d = q.shape[2] * q.shape[3]
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(d)
    return jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(x), v)


SPEC = registry.Mechanism(
    fn=set_transformer,
    module=SetTransformer,
    small=dict(
        num_heads=4,
        head_dim=8,
        num_seeds=3,
        num_inducing=4,
        encoder_blocks=1,
        decoder_blocks=1,
    ),
    papers=("set-transformer",),
    example=_example,
    oracle=_oracle,
    layout="set",
    claims=frozenset(
        {
            Claim.MASKABLE,
            Claim.CROSS,
            Claim.PERMUTATION_INVARIANT,
            Claim.DENSE_TWIN,
            Claim.LINEAR_MEMORY,
            Claim.LINEAR_COMPUTE,
            Claim.FORWARD_MODE,
        }
    ),
)
