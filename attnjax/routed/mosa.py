r"""MoSA: each head chooses the few tokens that it works on, and attends among them alone.

Paper: Piękos et al., "Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via
Expert-Choice Routing", arXiv:2505.00315.

    r   = sigmoid(x W_r)                                  a score for each token and head
    I_e = the C = max(floor(T / sparsity), 2) tokens with the highest r_e
    Q, K, V = x_I W_e,      queries and keys rotated by their positions I
    y   = sum_e scatter_I(r_I softmax(Q K^T / sqrt(H)) V W_o,e)

A head takes O(C^2 + T): projections, too, are of its own tokens only. The product with r is what
the router learns by. Heads with more matrices than scores are dense: they see all tokens, with
r = 1. The paper's models have a few of them beside many sparse ones.

Not causal, whatever the mask: with Causal a token sees no later one, but whether a head chooses it
depends on the scores of later ones. So a decoder can't run it token by token as it was trained.

Shapes: B batch, T tokens, N heads, E of them sparse, C tokens of a head, H head dim, D model dim.
Unlike the paper: all of H is rotated, where the authors' code rotates half. The perplexity at equal
compute is shown by the paper's training and not tested here.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from attnjax.core import layers, masks, positions, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops


def mosa(
    x: Float[Array, "B T D"],
    logits: Float[Array, "B T E"],
    qkv: Float[Array, "N D F"],
    out: Float[Array, "N H D"],
    *,
    sparsity: int = 4,
    keep_first: bool = False,
    rotary_base: float | None = None,
    mask: masks.Mask | None = None,
) -> Float[Array, "B T D"]:
    """y, in x's dtype.

    Args:
      logits: x W_r.
      qkv: of each head for queries, keys and values, F = 3 H; dense heads first, if N > E.
      sparsity, keep_first: `choose_tokens`. rotary_base: None is no rotation.
      mask: honours Causal and Valid; NotImplementedError for others. Hidden tokens are chosen last.

    Raises ValueError for sparsity below 1 and for more scores than matrices.
    """
    N, E = len(qkv), logits.shape[-1]
    if N < E:
        raise ValueError(f"{N} heads must be at least the {E} that have scores")
    _, valid = masks.select(mask, masks.Causal, masks.Valid, by="mosa")
    seen = functools.reduce(jnp.logical_and, (x.keys for x in valid), jnp.ones(x.shape[:2], bool))
    chosen = choose_tokens(logits, seen, sparsity=sparsity, keep_first=keep_first)
    qkv, out = qkv.astype(x.dtype), out.astype(x.dtype)
    b, e = jnp.arange(len(x))[:, None, None], jnp.arange(E)[None, :, None]
    o = _sparse(x[b, chosen], chosen, qkv[N - E :], rotary_base, mask)
    o = o * jax.nn.sigmoid(logits.astype(jnp.float32))[b, chosen, e][..., None]
    o = jnp.einsum("BECH,EHD->BECD", o.astype(x.dtype), out[N - E :])
    y = jnp.zeros(x.shape, jnp.float32).at[b, chosen].add(o.astype(jnp.float32))
    if N > E:
        q, k, v = _project(x, qkv[: N - E], jnp.arange(x.shape[1]), rotary_base)
        o = ops.dot_product_attention(q, k, v, mask=mask)
        y = y + jnp.einsum("BTNH,NHD->BTD", o, out[: N - E]).astype(jnp.float32)
    return y.astype(x.dtype)


def choose_tokens(
    logits: Float[Array, "B T E"], seen: Bool[Array, "B T"], *, sparsity: int, keep_first: bool
) -> Int[Array, "B E C"]:
    """I_e in order: the tokens with the highest logits, of those that are seen if they suffice.

    T counts all tokens, so that C is known while tracing. keep_first gives token 0 to every head.
    """
    if sparsity < 1:
        raise ValueError(f"{sparsity=} must be at least 1")
    T = logits.shape[1]
    if keep_first:
        logits = logits.at[:, 0].set(jnp.inf)
    logits = jnp.where(seen[..., None], logits, -jnp.inf)
    return jnp.sort(jax.lax.top_k(logits.swapaxes(1, 2), min(max(T // sparsity, 2), T))[1], -1)


def _sparse(x, at, qkv, base, mask):
    """Outputs (B E C H) of heads for their tokens x (B E C D) at positions `at` (B E C)."""
    leaves, tree = jax.tree.flatten(mask)  # each (B or 1, T)
    leaves = [jnp.broadcast_to(leaf, (len(x), *leaf.shape[1:])) for leaf in leaves]

    def head(x, at, qkv, leaves):
        q, k, v = _project(x[None], qkv[None], at, base)
        options = dict(mask=tree.unflatten([x[None] for x in leaves]), positions=(at, at))
        return ops.dot_product_attention(q, k, v, **options)[0, :, 0]

    return jax.vmap(jax.vmap(head, (0, 0, 0, None)), (0, 0, None, 0))(x, at, qkv, leaves)


def _project(x, qkv, at, base):
    """Queries, keys and values (B T N H) of tokens x (B T D) at positions `at` (T)."""
    q, k, v = jnp.split(jnp.einsum("BTD,NDF->BTNF", x, qkv), 3, -1)
    if base is None:
        return q, k, v
    return positions.rotary(q, at, base=base), positions.rotary(k, at, base=base), v


class Mosa(nn.Module):
    """`num_heads` sparse heads over (B T D), with `num_dense` dense ones beside them."""

    num_heads: int
    head_dim: int
    num_dense: int = 0
    sparsity: int = 4
    keep_first: bool = False
    rotary_base: float | None = None
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = mosa

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` may be Causal and Valid."""
        N, D, H = self.num_dense + self.num_heads, x.shape[-1], self.head_dim
        init = nn.initializers.lecun_normal(batch_axis=0)
        qkv = layers.Table((N, D, 3 * H), init, name="qkv")()
        out = layers.Table((N, H, D), init, name="out")()
        router = layers.Dense(self.num_heads, use_bias=False, dtype=self.dtype, name="router")
        options = dict(sparsity=self.sparsity, keep_first=self.keep_first)
        options |= dict(rotary_base=self.rotary_base, mask=mask)
        attend = layers.Attend(self.fn, name="attend")
        return attend(x.astype(self.dtype or x.dtype), router(x), qkv, out, **options)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
    heads = dict(qkv=draw(0, 4, 12, 24) / 3, out=draw(1, 4, 8, 12) / 3)
    return dict(x=draw(2, 2, T, 12), logits=draw(3, 2, T, 3)) | heads


def _oracle(x, logits, qkv, out, *, sparsity=4, keep_first=False, rotary_base=None, mask=None):
    """All pairs of tokens for every head, those that it didn't choose hidden."""
    (B, T, E), N = logits.shape, len(qkv)
    first = jnp.where(jnp.arange(T)[None, :, None] == 0, 1e9, 0) if keep_first else 0
    rank = jnp.argsort(jnp.argsort(-logits - first, 1), 1)
    chosen = jnp.concatenate([jnp.ones((B, T, N - E)), rank < max(T // sparsity, 2)], -1) > 0
    r = jnp.concatenate([jnp.ones((B, T, N - E)), jax.nn.sigmoid(logits)], -1)
    y = 0
    for n in range(N):
        q, k, v = jnp.split(x @ qkv[n], 3, -1)
        if rotary_base is not None:
            half = q.shape[-1] // 2
            angle = jnp.outer(jnp.arange(T), rotary_base ** -(jnp.arange(half) / half))
            turn = lambda z, angle=angle, h=half: (
                (z[..., :h] + 1j * z[..., h:]) * jnp.exp(1j * angle[None])
            )
            q, k = (jnp.concatenate([turn(z).real, turn(z).imag], -1) for z in (q, k))
        z = q @ k.mT / jnp.sqrt(q.shape[-1])
        z = jnp.where(masks.dense(mask, T, T)[:, 0] & chosen[:, None, :, n], z, -1e30)
        y += jnp.where(chosen, r, 0)[..., n, None] * (jax.nn.softmax(z) @ v @ out[n])
    return y


SPEC = registry.Mechanism(
    fn=mosa,
    module=Mosa,
    small=dict(num_heads=3, head_dim=8, num_dense=1, sparsity=2),
    papers=("mosa",),
    example=_example,
    oracle=_oracle,
    variants=(
        dict(sparsity=8),
        dict(sparsity=3, mask=masks.Causal(), keep_first=True, rotary_base=100.0),
    ),
    claims=frozenset(
        {Claim.MASKABLE, Claim.PERMUTATION_EQUIVARIANT, Claim.LINEAR_MEMORY, Claim.FORWARD_MODE}
    ),
)
