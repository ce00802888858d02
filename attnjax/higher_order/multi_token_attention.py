r"""Multi-token attention: several queries, keys and heads decide together where to look.

Paper: Golovneva et al., "Multi-Token Attention", arXiv:2504.00927, sections 3.1 to 3.3.

    x_ts = q_t . k_s / sqrt(H)                        for each head; 0 where t may not see s
    z_ts = sum_pw kernel_pw x_(t - P + 1 + p)(s - floor(W/2) + w)
    a_ts = softmax_s(z_ts)                            over the s that t may see
    o_tg = sum_s (sum_f a_ts,f mix_fg) v_s,g          f, g heads of one group

So the kernel spans the query itself and P - 1 before it, and keys on both sides. The scores are
computed for a few queries at a time (and again in the backward pass): memory is O(P S).

Shapes: B batch, T queries, S keys, N heads, H head dim, V value dim, P W kernel of queries and
keys, P1 = P - 1, U groups of F heads, D model dim.
Unlike the paper: other masks than causal ones hold for every pair that enters a score, so that
neither padding nor another document leaks in through the kernel; heads are mixed after softmax
alone, and weights are not convolved again; the norm of each head's output has no factor that
depends on depth, which the output projection can take over.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnjax.core import decode, layers, masks, positions, registry
from attnjax.core.registry import Claim

_TOGETHER = 64  # queries whose scores are computed at once


def multi_token_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N V"],
    kernel: Float[Array, "N P W"],
    mix: Float[Array, "U F F"],
    *,
    past: Float[Array, "B P1 N H"] | None = None,
    mask: masks.Mask | None = None,
    q_offset: int | Int[Array, ""] = 0,
) -> Float[Array, "B T N V"]:
    """o in v's dtype, computed in float32.

    Args:
      kernel: its last row is that of the query itself, its middle column that of the key itself.
      mix: weight of head f (first axis) in head g of each group of neighbouring heads.
      past: the P - 1 queries before the first; None is zeros, as before a sequence begins.
      mask: any; queries are tokens of the keys' sequence. One that sees nothing gives zeros.
      q_offset: position of the first query.

    Raises ValueError for an even W, and for a `mix` or `past` that doesn't fit.
    """
    (B, T, N, H), S, (P, W) = q.shape, k.shape[1], kernel.shape[1:]
    if W % 2 == 0 or mix.shape[0] * mix.shape[1] != N:
        raise ValueError(f"{W=} must be odd, and mix {mix.shape} must be for {N=} heads")
    past = jnp.zeros((B, P - 1, N, H), q.dtype) if past is None else past
    if past.shape[1] != P - 1:
        raise ValueError(f"past {past.shape} must hold {P - 1} queries")
    queries = jnp.concatenate([past, q], 1)
    values, kernel, mix = (x.astype(jnp.float32) for x in (v, kernel, mix))

    def one(i):
        t = q_offset + i
        near = jax.lax.dynamic_slice_in_dim(queries, i, P, 1)
        x = jnp.einsum("BPNH,BSNH->BNPS", near, k, preferred_element_type=jnp.float32)
        seen, together = _visible(mask, t, P, S)
        x = jnp.where(together, x * H**-0.5, 0.0)
        a = jax.nn.softmax(_convolve(x, kernel), where=seen)
        a = jnp.einsum("BUFS,UFG->BUGS", a.reshape(B, *mix.shape[:2], S), mix)
        return jnp.einsum("BNS,BSNV->BNV", a.reshape(B, N, S), values)

    o = jax.lax.map(jax.checkpoint(one), jnp.arange(T), batch_size=_TOGETHER)
    return o.swapaxes(0, 1).astype(v.dtype)


def _visible(mask, t, P, S):
    """The keys that t sees (B N S), and the pairs that may enter its scores (B N P S).

    Both t and the query of a pair must see its key, and t must see that query.
    """
    seen = masks.dense(mask, 1, S, q_offset=t)
    rows = t + jnp.arange(1 - P, 1)
    queries = jnp.take(seen, rows, -1, mode="clip").swapaxes(2, 3)
    return seen[:, :, 0], seen & queries & masks.dense(mask, P, S, q_offset=t + 1 - P)


def _convolve(x: Float[Array, "B N P S"], kernel: Float[Array, "N P W"]) -> Float[Array, "B N S"]:
    """Sum over the queries and, by a kernel that slides, over the keys around each."""
    (B, N, P, S), side = x.shape, kernel.shape[-1] // 2
    return jax.lax.conv_general_dilated(
        x.reshape(B, N * P, S),
        kernel,
        window_strides=(1,),
        padding=[(side, side)],
        dimension_numbers=("NCH", "OIH", "NCH"),
        feature_group_count=N,
    )


class State(NamedTuple):
    """Keys and values of all tokens, and the queries that the next kernel still spans."""

    cache: decode.KVCache
    past: Float[Array, "B P1 N H"]


class MultiTokenAttention(nn.Module):
    """Multi-head attention over (B T D) whose scores are convolved; at first by the identity.

    queries and keys are the sizes of the kernel, group the heads that are mixed. rotary_base None
    is no rotation. Streaming is causal.
    """

    num_heads: int
    head_dim: int
    queries: int = 6
    keys: int = 11
    group: int = 2
    rotary_base: float | None = None
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = multi_token_attention

    def setup(self):
        N, H, F = self.num_heads, self.head_dim, self.group
        if N % F:
            raise ValueError(f"num_heads={N} must be a multiple of group={F}")
        self.query = layers.HeadProjection(N, H, self.dtype)
        self.key = layers.HeadProjection(N, H, self.dtype)
        self.value = layers.HeadProjection(N, H, self.dtype)
        self.kernel = layers.Table((N, self.queries, self.keys), _only_itself)
        self.mix = layers.Table((N // F, F, F), _identity)
        self.attend = layers.Attend(self.fn)
        self.norm = nn.RMSNorm(dtype=self.dtype)
        self.out = layers.OutputProjection(self.dtype)

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says what each token sees."""
        q, k, v = self._project(x, jnp.arange(x.shape[1]))
        o = self.attend(q, k, v, self.kernel(), self.mix(), mask=mask)
        return self.out(self.norm(o), x.shape[-1])

    def init_state(self, batch: int, length: int) -> State:
        """An empty cache for `length` tokens, and no queries before the first."""
        N, H, dtype = self.num_heads, self.head_dim, self.dtype or jnp.float32
        cache = decode.KVCache.empty(batch, length, N, H, H, dtype)
        return State(cache, jnp.zeros((batch, self.queries - 1, N, H), dtype))

    def extend(self, state: State, x: Float[Array, "B T D"]) -> tuple[State, Float[Array, "B T D"]]:
        """The next T tokens, each of which sees those before it and itself."""
        length, T = state.cache.length, x.shape[1]
        q, k, v = self._project(x, length + jnp.arange(T))
        cache = state.cache.append(k, v)
        options = dict(past=state.past, mask=masks.Causal(), q_offset=length)
        o = self.attend(q, cache.k, cache.v, self.kernel(), self.mix(), **options)
        past = jnp.concatenate([state.past, q], 1)[:, T:]
        return State(cache, past), self.out(self.norm(o), x.shape[-1])

    def _project(self, x, at):
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.rotary_base is not None:
            q = positions.rotary(q, at, base=self.rotary_base)
            k = positions.rotary(k, at, base=self.rotary_base)
        return q, k, v


def _only_itself(key, shape):
    return jnp.zeros(shape).at[:, -1, shape[-1] // 2].set(1.0)


def _identity(key, shape):
    return jnp.broadcast_to(jnp.eye(shape[-1])[None], shape)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 6))
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape) / 2
    return dict(q=q, k=k, v=v, kernel=draw(1, 4, 3, 5), mix=draw(2, 2, 2, 2))


def _oracle(q, k, v, kernel, mix, *, mask=None):
    (_, P, W), (T, S), F = kernel.shape, (q.shape[1], k.shape[1]), mix.shape[-1]
    seen = masks.dense(mask, T, S)
    x = jnp.where(seen, jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1]), 0)
    x = jnp.pad(x, ((0, 0), (0, 0), (P - 1, 0), (W // 2, W // 2)))
    z = 0
    for p in range(P):
        for w in range(W):
            z += kernel[None, :, p, w, None, None] * x[:, :, p : p + T, w : w + S]
    a = jax.nn.softmax(jnp.where(seen, z, -1e30))
    mixed = []
    for n in range(q.shape[2]):
        u, g = n // F, n % F
        mixed.append(sum(a[:, u * F + f] * mix[u, f, g] for f in range(F)) @ v[:, :, n])
    return jnp.stack(mixed, 2)


SPEC = registry.Mechanism(
    fn=multi_token_attention,
    module=MultiTokenAttention,
    small=dict(num_heads=4, head_dim=8, queries=3, keys=5),
    papers=("multi-token-attention",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(mask=masks.Causal())),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.STREAMABLE,
            Claim.DENSE_TWIN,
            Claim.LINEAR_MEMORY,
            Claim.FORWARD_MODE,
        }
    ),
)
