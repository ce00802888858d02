r"""Super attention: keys and values are the tokens themselves, mixed by position before attention.

Paper: Hosseini and Hosseini, "You Need to Pay Better Attention", arXiv:2403.01643 (later "Cost-
Effective Attention Mechanisms for Low Resource Settings"), optimised, efficient, super attention.

    optimised:   head_n = softmax(Q_n K_n^T / sqrt(H)) X_n,      Q_n = x P_q,n,  K_n = x P_k,n
    efficient:   head_n = softmax(Q_n X_n^T / sqrt(H)) X_n
    super:       head_n = softmax(Q_n X_n^T / sqrt(H)) A X_n,        y = sum_n head_n P_o,n

X_n is the n-th slice of H features of x, so D = N H, and A (L L) is learned, of all heads, with L
the longest sequence. Beside 4 D^2 weights of multi-head attention these have 3 D^2, 2 D^2 and
2 D^2 + L^2. For one head the two projections left out lose nothing: P_q P_k^T is one matrix, and
so is P_v P_o.

Shapes: B batch, T queries, S keys, N heads, H head dim, V value dim, D model dim, L length.
Unlike the paper: under a mask, A mixes into the value of a token only what that token sees (for a
causal mask A is triangular, as in the paper); A begins as the identity, which is efficient
attention.
"""

from collections.abc import Callable
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnjax.core import decode, layers, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops

Form = Literal["optimised", "efficient", "super"]


def super_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N V"],
    alignment: Float[Array, "L L"] | None = None,
    *,
    mask: masks.Mask | None = None,
    score_mod: Callable[..., jax.Array] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """Attention with scale 1/sqrt(H) to values that `align` has mixed, in v's dtype.

    Args:
      alignment: A. None leaves the values as they are: aligned already, or not at all.
      mask: with an alignment, of Causal, Valid and Segments.

    The other options are those of `ops.dot_product_attention`. Raises as `align` does.
    """
    if alignment is not None:
        v = align(v, alignment, mask=mask)
    options = dict(mask=mask, score_mod=score_mod, q_offset=q_offset)
    return ops.dot_product_attention(q, k, v, implementation=implementation, **options)


def align(
    v: Float[Array, "B S N V"],
    alignment: Float[Array, "L L"],
    *,
    mask: masks.Mask | None = None,
    first: int | Int[Array, ""] = 0,
    count: int | None = None,
) -> Float[Array, "B T N V"]:
    """sum_j A_sj v_j over the tokens j that s sees, in v's dtype.

    Only for the tokens s = first ... first + count - 1; count None is all S. A query that sees s
    must see what s sees: raises NotImplementedError for masks other than Causal, Valid, and
    Segments without ids of their own for keys. Raises ValueError for S > L.
    """
    (B, S, N, V), L = v.shape, len(alignment)
    if S > L:
        raise ValueError(f"{S=} must be at most {L=}, the length of the alignment")
    kinds = masks.Causal, masks.Valid, masks.Segments
    *_, segments = masks.select(mask, *kinds, by="super_attention")
    if any(part.kv is not None for part in segments):
        raise NotImplementedError("super_attention can't honour Segments with ids for keys")
    count = S if count is None else count
    rows = jax.lax.dynamic_slice_in_dim(alignment.astype(jnp.float32), first, count)[None, :, :S]
    rows = jnp.where(masks.dense(mask, count, S, q_offset=first)[:, 0], rows, 0.0)
    mixed = rows @ v.astype(jnp.float32).reshape(B, S, N * V)
    return mixed.reshape(B, count, N, V).astype(v.dtype)


class SuperAttention(nn.Module):
    """The three attentions of the paper over (B T D) with D = num_heads * head_dim.

    length: L, for the form "super" and no other. Raises ValueError for what doesn't fit.
    """

    num_heads: int
    head_dim: int
    form: Form = "super"
    length: int | None = None
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = super_attention

    def setup(self):
        if self.form not in get_args(Form):
            raise ValueError(f"form={self.form!r} must be one of {get_args(Form)}")
        if (self.form == "super") != (self.length is not None):
            raise ValueError(f"length={self.length} must be given just where form is 'super'")
        heads = self.num_heads, self.head_dim, self.dtype
        self.query = layers.HeadProjection(*heads)
        if self.form == "optimised":
            self.key = layers.HeadProjection(*heads)
        if self.form == "super":
            self.alignment = layers.Table((self.length, self.length), _identity)
        self.attend = layers.Attend(self.fn)
        self.out = layers.OutputProjection(self.dtype)

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says what each token sees."""
        alignment = self.alignment() if self.form == "super" else None
        return self.out(self.attend(*self._project(x), alignment, mask=mask), x.shape[-1])

    def init_state(self, batch: int, length: int) -> decode.KVCache:
        """An empty cache for `length` tokens: keys and aligned values."""
        N, H = self.num_heads, self.head_dim
        return decode.KVCache.empty(batch, length, N, H, H, self.dtype or jnp.float32)

    def extend(
        self, state: decode.KVCache, x: Float[Array, "B T D"]
    ) -> tuple[decode.KVCache, Float[Array, "B T D"]]:
        """The next T tokens, each of which sees those before it and itself."""
        q, k, v = self._project(x)
        if self.form == "super":
            past = state.append(k, v).k  # keys are the tokens themselves
            at = dict(first=state.length, count=x.shape[1])
            v = align(past, self.alignment(), mask=masks.Causal(), **at)
        cache = state.append(k, v)
        causal = dict(mask=masks.Causal(), q_offset=state.length)
        return cache, self.out(self.attend(q, cache.k, cache.v, **causal), x.shape[-1])

    def _project(self, x):
        (*_, D), N, H = x.shape, self.num_heads, self.head_dim
        if N * H != D:
            raise ValueError(f"num_heads={N} times head_dim={H} must be {D=}")
        slices = x.astype(self.dtype or x.dtype).reshape(*x.shape[:-1], N, H)
        return self.query(x), self.key(x) if self.form == "optimised" else slices, slices


def _identity(key, shape):
    return jnp.eye(*shape)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    alignment = jax.random.normal(jax.random.fold_in(key, 1), (T + 2, T + 2)) / jnp.sqrt(T + 2)
    return dict(q=q, k=k, v=v, alignment=alignment)


def _oracle(q, k, v, alignment, *, mask=None):
    T, S = q.shape[1], k.shape[1]
    A = jnp.where(masks.dense(mask, S, S)[0, 0], alignment[:S, :S], 0)
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    x = jnp.where(masks.dense(mask, T, S), x, -1e30)
    return jnp.einsum("BNTS,SJ,BJNV->BTNV", jax.nn.softmax(x), A, v)


SPEC = registry.Mechanism(
    fn=super_attention,
    module=SuperAttention,
    small=dict(num_heads=4, head_dim=12, length=64),
    papers=("super-attention",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(mask=masks.Causal())),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.CROSS,
            Claim.STREAMABLE,
            Claim.DENSE_TWIN,
            Claim.CONTEXT_PARALLEL,
            Claim.FORWARD_MODE,
        }
    ),
    context=("gather",),
)
