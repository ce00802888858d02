r"""BandControlNet: bars that are alike attend more to each other, and tracks meet at every bar.

Paper: Luo et al., "BandControlNet: Parallel Transformers-based Steerable Popular Music Generation
with Fine-Grained Spatiotemporal Features", arXiv:2407.10462: structure-enhanced self-attention and
the cross-track transformer, both read from the authors' code.

    S    = norm(softmax(f W_q (f W_k)^T / sqrt(F)))         by rows of bars; f: what each shall be
    x_ts = S_ij q_t . k_s / sqrt(H)                         token t of bar i, token s of bar j
    o_t  = sum_s softmax_s(x_ts) v_s

A row of S has the mean 0, until training moves it: the scores of bars that are unlike change their
sign. A piece is a few tracks, each a sequence of its own, so here B counts
tracks. They come together between two stacks of layers, in the tokens with which bars begin
(`CrossTracks`): of one bar, those of all tracks attend to each other, by linear attention.

Shapes: B batch, T queries, S keys, N heads, K kv-heads, H head dim, V value dim, D model dim,
L bars, F features, R tracks, P pieces of music.
Unlike the paper: where the bars of tokens and f come from (tokens that name bars; chords, densities
and codes of a learned quantiser, encoded) and the cross-attention to f belong to the model;
projections have no biases. That the music has more structure is the paper's result, not seen here.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from attnjax.core import attention, decode, layers, masks, positions, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import linear_attention as linear


def bandcontrolnet(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    similarity: Float[Array, "B L L"],
    bars: Int[Array, "B S"],
    *,
    mask: masks.Mask | None = None,
    score_mod: Callable[..., jax.Array] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """o in v's dtype, with O(T + L^2) memory. Other options: `ops.dot_product_attention`.

    Args:
      similarity, bars: S, and the bar of each token by position, queries' too.
      score_mod: is given the scores x.
    """
    similarity = similarity.astype(jnp.float32)

    def by_bars(score, b, n, t, s):
        score = score * similarity[b, bars[b, t], bars[b, s]]
        return score if score_mod is None else score_mod(score, b, n, t, s)

    options = dict(mask=mask, score_mod=by_bars, q_offset=q_offset)
    return ops.dot_product_attention(q, k, v, implementation=implementation, **options)


def bar_similarity(
    q: Float[Array, "B L F"],
    k: Float[Array, "B L F"],
    scale: Float[Array, "L"],
    bias: Float[Array, "L"],
    *,
    valid: Bool[Array, "B L"] | None = None,
) -> Float[Array, "B L L"]:
    """S in float32, of f W_q and f W_k. Bars that are not valid get no weight before the norm.

    Args:
      scale, bias: of the norm, for each column.
    """
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = jnp.einsum("BLF,BMF->BLM", q, k) * q.shape[-1] ** -0.5
    w = jax.nn.softmax(scores, where=None if valid is None else valid[:, None])
    mean, variance = w.mean(-1, keepdims=True), w.var(-1, keepdims=True)
    return (w - mean) * jax.lax.rsqrt(variance + 1e-5) * scale[None, None] + bias[None, None]


class BarSimilarity(nn.Module):
    """S (B L L) of features (B L F); the norm has parameters for each of the L bars."""

    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, features: Float[Array, "B L F"], *, valid: Bool[Array, "B L"] | None = None
    ) -> Float[Array, "B L L"]:
        """`valid` says which bars there are."""
        L, F = features.shape[1:]
        dense = lambda name: layers.Dense(F, use_bias=False, dtype=self.dtype, name=name)(features)
        scale = layers.Table((L,), nn.initializers.ones, name="scale")()
        bias = layers.Table((L,), nn.initializers.zeros, name="bias")()
        return bar_similarity(dense("query"), dense("key"), scale, bias, valid=valid)


class State(NamedTuple):
    """Keys and values, and the bars of all tokens."""

    cache: decode.KVCache
    bars: Int[Array, "B S"]


class Bandcontrolnet(attention.KeyValueAttention):
    """Structure-enhanced attention over (B T D).

    `similarity` of bars is what a BarSimilarity gives, which is one for all layers. Without it all
    bars are alike, which is plain attention.
    """

    fn: Callable[..., jax.Array] = bandcontrolnet

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: masks.Mask | None = None,
        similarity: Float[Array, "B L L"] | None = None,
        bars: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself, its tokens being of these `bars`."""
        similarity, bars = _or_alike(x, similarity, bars)
        q, k, v = self._project(x, jnp.arange(x.shape[1]))
        return self.out(self.attend(q, k, v, similarity, bars, mask=mask), x.shape[-1])

    def init_state(self, batch: int, length: int) -> State:
        """An empty cache for `length` tokens."""
        return State(super().init_state(batch, length), jnp.zeros((batch, length), jnp.int32))

    def extend(
        self,
        state: State,
        x: Float[Array, "B T D"],
        *,
        similarity: Float[Array, "B L L"] | None = None,
        bars: Int[Array, "B T"] | None = None,
    ) -> tuple[State, Float[Array, "B T D"]]:
        """The next T tokens, each of which sees those before it and itself."""
        similarity, new = _or_alike(x, similarity, bars)
        length = state.cache.length
        q, k, v = self._project(x, length + jnp.arange(x.shape[1]))
        cache = state.cache.append(k, v)
        bars = jax.lax.dynamic_update_slice_in_dim(state.bars, new, length, 1)
        options = dict(mask=masks.Causal(), q_offset=length)
        o = self.attend(q, cache.k, cache.v, similarity, bars, **options)
        return State(cache, bars), self.out(o, x.shape[-1])


def _or_alike(x, similarity, bars):
    if (similarity is None) != (bars is None):
        raise ValueError("similarity and bars must be given together, or neither")
    if bars is None:
        return jnp.ones((len(x), 1, 1)), jnp.zeros(x.shape[:2], jnp.int32)
    return similarity, bars


class CrossTracks(nn.Module):
    """The cross-track transformer: each bar's first tokens, of all tracks, attend to each other."""

    num_heads: int
    head_dim: int
    mlp_dim: int
    num_layers: int = 2
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "P R T D"], starts: Int[Array, "P R L"]
    ) -> Float[Array, "P R T D"]:
        """x with new tokens at `starts`, where bars begin: T for those that a track lacks."""
        (P, R, T, D), L = x.shape, starts.shape[-1]
        by_bar = lambda a: a.swapaxes(1, 2).reshape(P * L, R, *a.shape[3:])
        z = jnp.take_along_axis(x, starts[..., None], 2, mode="fill", fill_value=0)
        z = by_bar(z + positions.sinusoidal(L, D)[None, None].astype(x.dtype))
        for i in range(self.num_layers):
            options = self.num_heads, self.head_dim, self.mlp_dim, self.dtype
            z = _TrackLayer(*options, name=f"layer_{i}")(z, masks.Valid(by_bar(starts < T)))
        p, r, _ = jnp.ix_(*(jnp.arange(n) for n in starts.shape))
        new = z.reshape(P, L, R, D).swapaxes(1, 2).astype(x.dtype)
        return x.at[p, r, starts].set(new, mode="drop")


class _TrackLayer(nn.Module):
    """Linear attention and a feed-forward layer, each followed by its norm."""

    num_heads: int
    head_dim: int
    mlp_dim: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, z: Float[Array, "B R D"], mask: masks.Mask) -> Float[Array, "B R D"]:
        heads = lambda name: layers.HeadProjection(
            self.num_heads, self.head_dim, self.dtype, name=name
        )(z)
        phi = lambda a: nn.elu(a) + 1
        q, k, v = phi(heads("query")), phi(heads("key")), heads("value")
        o, _ = linear.linear_attention(q, k, v, mask=mask, by="CrossTracks")
        o = layers.OutputProjection(self.dtype, name="out")(o, z.shape[-1])
        z = nn.LayerNorm(dtype=self.dtype, name="attended_norm")(z + o)
        hidden = nn.gelu(layers.Dense(self.mlp_dim, dtype=self.dtype, name="up")(z))
        z = z + layers.Dense(z.shape[-1], dtype=self.dtype, name="down")(hidden)
        return nn.LayerNorm(dtype=self.dtype, name="norm")(z)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    similarity = jax.random.normal(jax.random.fold_in(key, 1), (2, 5, 5))
    bars = jnp.arange(T)[None] * jnp.array([[5], [3]]) // (T + 1)
    return dict(q=q, k=k, v=v, similarity=similarity, bars=bars)


def _oracle(q, k, v, similarity, bars, *, mask=None):
    T, S = q.shape[1], k.shape[1]
    of_bar = jax.nn.one_hot(bars, similarity.shape[-1])
    factor = jnp.einsum("BTL,BLM,BSM->BTS", of_bar[:, :T], similarity, of_bar)
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1]) * factor[:, None]
    x = jnp.where(masks.dense(mask, T, S), x, -1e30)
    return jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(x), v)


SPEC = registry.Mechanism(
    fn=bandcontrolnet,
    module=Bandcontrolnet,
    small=dict(num_heads=4, head_dim=8),
    papers=("bandcontrolnet",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(mask=masks.Causal()), dict(implementation="blocked")),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.CROSS,
            Claim.STREAMABLE,
            Claim.DENSE_TWIN,
            Claim.LINEAR_MEMORY,
            Claim.CONTEXT_PARALLEL,
            Claim.PERMUTATION_EQUIVARIANT,
            Claim.FORWARD_MODE,
        }
    ),
    context=("gather",),
)
