r"""Multi-head latent attention: keys and values of all heads come from one small latent vector.

Paper: DeepSeek-AI, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language
Model", arXiv:2405.04434, eqs. 9 to 19. The count of operations per byte: Yun et al., "The New LLM
Bottleneck: A Systems Perspective on Latent Attention and Mixture-of-Experts", arXiv:2507.15465.

    c_s    = norm(x_s W_DKV),   r_s = rotary(x_s W_KR)                            what is cached
    k_s,n  = [c_s U_n; r_s],    v_s,n = c_s W_n,    q_t,n = [q^C_t,n; rotary(q^R_t,n)]
    o_t,n  = sum_s softmax_s(q_t,n . k_s,n / sqrt(H + P)) v_s,n                       expanded
           = (sum_s softmax_s(p_t,n . [c_s; r_s] / sqrt(H + P)) c_s) W_n              absorbed,
    p_t,n  = [q^C_t,n U_n^T; rotary(q^R_t,n)]

The forms are equal. The expanded one does less arithmetic where all is known at once; the absorbed
one is multi-query attention over the latents, which reads R + P numbers a token where multi-head
attention reads 2 N H, and is what `extend` uses.

Shapes: B batch, T queries, S keys, N heads, H head dim without rotation, P rotated dim, V value
dim, R rank of the latent, D model dim.
Unlike the paper: queries have a latent only where `query_rank` is given.
"""

from collections.abc import Callable
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnjax.core import decode, layers, masks, paging, positions, registry
from attnjax.core.registry import Claim
from attnjax.ops import decode_attention
from attnjax.ops import dot_product_attention as ops

Form = Literal["expanded", "absorbed"]


def multi_head_latent_attention(
    q: Float[Array, "B T N H"],
    q_rope: Float[Array, "B T N P"],
    latent: Float[Array, "B S L"],
    up: Float[Array, "R N F"],
    *,
    mask: masks.Mask | None = None,
    form: Form = "expanded",
    q_offset: int | Int[Array, ""] = 0,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """Eqs. 16 to 18 for L = R + P and F = H + V.

    Args:
      latent: c and r side by side, r rotated as q_rope is.
      up: U and W side by side.
      form: of computing the same; other options as those of `ops.dot_product_attention`.

    Raises ValueError for another form.
    """
    if form not in get_args(Form):
        raise ValueError(f"{form=} must be one of {get_args(Form)}")
    options = dict(mask=mask, q_offset=q_offset, implementation=implementation)
    R = len(up)
    if form == "absorbed":
        k, v = latent[:, :, None], latent[:, :, None, :R]
        attend = lambda p, scale: ops.dot_product_attention(p, k, v, scale=scale, **options)
        return _absorbed(attend, q, q_rope, up.astype(latent.dtype))
    split = jnp.split(up.astype(latent.dtype), [q.shape[-1]], -1)
    k, v = (jnp.einsum("BSR,RNF->BSNF", latent[..., :R], w) for w in split)
    shared = jnp.broadcast_to(latent[:, :, None, R:], (*k.shape[:3], latent.shape[-1] - R))
    q, k = jnp.concatenate([q, q_rope], -1), jnp.concatenate([k, shared], -1)
    return ops.dot_product_attention(q, k, v, **options)


def paged_latent_attention(
    q: Float[Array, "B T N H"],
    q_rope: Float[Array, "B T N P"],
    cache: paging.PagedCache,
    up: Float[Array, "R N F"],
    *,
    q_offset: Int[Array, "B"] | None = None,
    implementation: decode_attention.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """The absorbed form over latents that lie in pages: the keys of a cache without values.

    Options: `ops.decode_attention`, as also for what it raises.
    """
    options = dict(value_dim=len(up), q_offset=q_offset, implementation=implementation)
    attend = lambda p, scale: decode_attention.decode_attention(p, cache, scale=scale, **options)
    return _absorbed(attend, q, q_rope, up.astype(cache.k.dtype))


def _absorbed(attend, q, q_rope, up):
    """The heads that attend(p: B T N R+P, scale), to latents, gives."""
    H, P = q.shape[-1], q_rope.shape[-1]
    up_key, up_value = jnp.split(up, [H], -1)
    p = jnp.concatenate([jnp.einsum("BTNH,RNH->BTNR", q, up_key), q_rope], -1)
    return jnp.einsum("BTNR,RNV->BTNV", attend(p, (H + P) ** -0.5), up_value)


def decode_intensity(
    num_heads: int, *, key_dim: int, value_dim: int, cached: int, itemsize: int = 2
) -> float:
    """Operations per byte of cache that a step of decoding reads, in attention alone.

    Each head takes a product of key_dim and adds up value_dim numbers for every token, of which
    the cache holds `cached` numbers of `itemsize` bytes: 2 N H for multi-head attention, R + P for
    the absorbed form, whose key_dim is R + P and value_dim is R.
    """
    return 2 * num_heads * (key_dim + value_dim) / (itemsize * cached)


def expert_intensity(tokens: int, *, num_experts: int, topk: int, itemsize: int = 2) -> float:
    """Operations per byte of weights of an evenly loaded mixture of experts: grows by batching."""
    return 2 * tokens * topk / num_experts / itemsize


class MultiHeadLatentAttention(nn.Module):
    """Eqs. 9 to 19 over (B T D), values as wide as H.

    rank None is 4 H and rope_dim None is H / 2, as in the paper. query_rank None projects queries
    straight from x. Streaming is causal, with page_size through pages of so many tokens.
    """

    num_heads: int
    head_dim: int
    rank: int | None = None
    rope_dim: int | None = None
    query_rank: int | None = None
    rotary_base: float = 10_000.0
    page_size: int | None = None
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = multi_head_latent_attention
    paged_fn: Callable[..., jax.Array] = paged_latent_attention

    def setup(self):
        N, H = self.num_heads, self.head_dim
        R, P = self._sizes()
        if self.query_rank is not None:
            self.compress_query = layers.Dense(self.query_rank, use_bias=False, dtype=self.dtype)
            self.query_norm = nn.RMSNorm(dtype=self.dtype)
        self.query = layers.HeadProjection(N, H, self.dtype)
        self.query_rope = layers.HeadProjection(N, P, self.dtype)
        self.compress = layers.Dense(R, use_bias=False, dtype=self.dtype)
        self.norm = nn.RMSNorm(dtype=self.dtype)
        self.key_rope = layers.HeadProjection(1, P, self.dtype)
        self.heads = layers.HeadKernel((R, N, 2 * H))
        self.attend = layers.Attend(self.fn)
        self.attend_pages = layers.Attend(self.paged_fn)
        self.out = layers.OutputProjection(self.dtype)

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself, in the expanded form; `mask` says what each token sees."""
        q, q_rope, latent = self._project(x, jnp.arange(x.shape[1]))
        return self.out(self.attend(q, q_rope, latent, self.heads(), mask=mask), x.shape[-1])

    def init_state(self, batch: int, length: int) -> decode.KVCache | paging.PagedCache:
        """An empty cache of `length` tokens: latents as keys, whose front is the values."""
        size, dtype = sum(self._sizes()), self.dtype or jnp.float32
        if self.page_size is None:
            return decode.KVCache.empty(batch, length, 1, size, 0, dtype)
        options = dict(page_size=self.page_size)
        return paging.PagedCache.empty(batch, length, 1, size, None, dtype, **options)

    def extend(
        self, state: decode.KVCache | paging.PagedCache, x: Float[Array, "B T D"]
    ) -> tuple[decode.KVCache | paging.PagedCache, Float[Array, "B T D"]]:
        """The next T tokens, in the absorbed form; each sees those before it and itself."""
        if isinstance(state, paging.PagedCache):
            q, q_rope, latent = paging.projected(self._project, x, state.lengths)
            cache = state.append(latent[:, :, None], None)
            o = self.attend_pages(q, q_rope, cache, self.heads(), q_offset=state.lengths)
        else:
            q, q_rope, latent = self._project(x, state.length + jnp.arange(x.shape[1]))
            cache = state.append(latent[:, :, None], latent[:, :, None, :0])
            options = dict(form="absorbed", mask=masks.Causal(), q_offset=state.length)
            o = self.attend(q, q_rope, cache.k[:, :, 0], self.heads(), **options)
        return cache, self.out(o, x.shape[-1])

    def _sizes(self):
        """R and P."""
        return self.rank or 4 * self.head_dim, self.rope_dim or self.head_dim // 2

    def _project(self, x, at):
        rotate = lambda x: positions.rotary(x, at, base=self.rotary_base)
        c, r = self.norm(self.compress(x)), rotate(self.key_rope(x))[:, :, 0]
        if self.query_rank is not None:
            x = self.query_norm(self.compress_query(x))
        return self.query(x), rotate(self.query_rope(x)), jnp.concatenate([c, r], -1)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
    q, q_rope, latent = draw(0, 2, T, 4, 8), draw(1, 2, T, 4, 4), draw(2, 2, T, 16 + 4)
    return dict(q=q, q_rope=q_rope, latent=latent, up=draw(3, 16, 4, 8 + 6) / 4)


def _oracle(q, q_rope, latent, up, *, mask=None, form=None):
    del form  # both are the same
    c, r, heads = latent[..., : len(up)], latent[..., len(up) :], []
    for n in range(q.shape[2]):
        k, v = c @ up[:, n, : q.shape[-1]], c @ up[:, n, q.shape[-1] :]
        x = q[:, :, n] @ k.mT + q_rope[:, :, n] @ r.mT
        x = x / jnp.sqrt(q.shape[-1] + q_rope.shape[-1])
        x = jnp.where(masks.dense(mask, *x.shape[1:])[:, 0], x, -1e30)
        heads.append(jax.nn.softmax(x) @ v)
    return jnp.stack(heads, 2)


SPEC = registry.Mechanism(
    fn=multi_head_latent_attention,
    module=MultiHeadLatentAttention,
    small=dict(num_heads=4, head_dim=8, rank=16, query_rank=12),
    papers=("mla-moe-systems",),  # DeepSeek-V2 itself is not in the catalogue
    example=_example,
    oracle=_oracle,
    variants=({}, dict(mask=masks.Causal()), dict(mask=masks.Causal(), form="absorbed")),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.STREAMABLE,
            Claim.LINEAR_MEMORY,
            Claim.CONTEXT_PARALLEL,
            Claim.FORWARD_MODE,
        }
    ),
    context=("gather",),
)
