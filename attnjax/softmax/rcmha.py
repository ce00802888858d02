r"""RCMHA: convolved queries, keys and values, and scores that know relative positions.

Paper: Sugiharto et al., "RCMHA: Relative Convolutional Multi-Head Attention for Natural Language
Modelling", arXiv:2308.03429; scores as in Dai et al., "Transformer-XL", arXiv:1901.02860,
section 3.3; the kernel of 3 tokens, causal and the same for all heads, from the authors' code.

    q_t  = sum_w c^q_w * (x_{t-w} P_q)                  likewise k and v; w = 0 ... W-1
    r_d  = [sin(f d), cos(f d)] R                       d = t - s, frequencies f_i = 10000^(-2i/F)
    x_ts = ((q_t + a) . k_s + (q_t + b) . r_{t-s}) / sqrt(H),      o_t = sum_s softmax(x_t)_s v_s

Waves of a difference are products of waves: with z = R (q_t + b) and rot(z, t) the rotation of
the pairs (z_i, z_{i+F/2}) by f_i t,

    (q_t + b) . r_{t-s} = z . [sin(f (t-s)), cos(f (t-s))] = rot(z, t) . rot([0, 1], s)

so the scores are products of queries and keys of H + F features: no table, no shift of a matrix,
any length, and memory O(T).

Shapes: B batch, T queries, S keys, N heads, H head dim, V value dim, D model dim, W kernel size,
F features of a position.
Unlike the paper: the authors' code learns r_d and b . r_d for each of 8192 offsets, where
Transformer-XL has waves; no biases in projections and convolutions.
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
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import state_masks


def rcmha(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N V"],
    content_bias: Float[Array, "N H"],
    position_bias: Float[Array, "N H"],
    relative: Float[Array, "N F H"],
    *,
    mask: masks.Mask | None = None,
    score_mod: Callable[..., jax.Array] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """Relative attention to what `convolve` gives, in v's dtype.

    Args:
      content_bias, position_bias, relative: a, b and R of each head.
      q_offset: position of the first query; keys begin at 0.

    The other options are those of `ops.dot_product_attention`. Raises ValueError for an odd F.
    """
    (B, S, N, H), F = k.shape, relative.shape[1]
    if F % 2:
        raise ValueError(f"{F=} must be even")
    a, b = (x.astype(q.dtype)[None, None] for x in (content_bias, position_bias))
    waves = jnp.einsum("BTNH,NFH->BTNF", q + b, relative.astype(q.dtype))
    waves = positions.rotary(waves, q_offset + jnp.arange(q.shape[1]))
    key = jnp.repeat(jnp.array([0.0, 1.0], k.dtype), F // 2)
    key = positions.rotary(jnp.broadcast_to(key[None, None, None], (1, S, 1, F)), jnp.arange(S))
    q = jnp.concatenate([q + a, waves], -1)
    k = jnp.concatenate([k, jnp.broadcast_to(key, (B, S, N, F))], -1)
    options = dict(mask=mask, score_mod=score_mod, q_offset=q_offset, scale=H**-0.5)
    return ops.dot_product_attention(q, k, v, implementation=implementation, **options)


def convolve(
    x: Float[Array, "B T N H"], kernel: Float[Array, "W H"], *, mask: masks.Mask | None = None
) -> Float[Array, "B T N H"]:
    """sum_w kernel_w * x_{t-w} over the tokens of x that t may see, in x's dtype.

    Raises NotImplementedError for masks other than Causal, Valid and Segments without ids of their
    own for keys.
    """
    kinds = masks.Causal, masks.Valid, masks.Segments
    _, valid, segments = masks.select(mask, *kinds, by="rcmha")
    if any(part.kv is not None for part in segments):
        raise NotImplementedError("rcmha can't honour Segments with ids of their own for keys")
    x, y = state_masks.only_valid(x, valid), 0.0
    for w, weight in enumerate(kernel.astype(x.dtype)):
        past = _shift(x, w)
        for part in segments:
            past = jnp.where((part.q == _shift(part.q, w))[:, :, None, None], past, 0)
        y = y + past * weight[None, None, None]
    return y


def _shift(x, w):
    """x_{t-w} at t (B T ...), zero before the first."""
    return jnp.pad(x, ((0, 0), (w, 0), *[(0, 0)] * (x.ndim - 2)))[:, : x.shape[1]]


class State(NamedTuple):
    """Keys and values after the convolution, and projections of the last W - 1 tokens before."""

    cache: decode.KVCache
    recent: Float[Array, "3 B W1 N H"]


class Rcmha(nn.Module):
    """RCMHA over (B T D). num_features F of a position, None is H; streaming is causal."""

    num_heads: int
    head_dim: int
    kernel_size: int = 3
    num_features: int | None = None
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = rcmha

    def setup(self):
        N, H, F = self.num_heads, self.head_dim, self.num_features or self.head_dim
        init = nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        self.query = layers.HeadProjection(N, H, self.dtype)
        self.key = layers.HeadProjection(N, H, self.dtype)
        self.value = layers.HeadProjection(N, H, self.dtype)
        self.kernels = layers.Table((3, self.kernel_size, H), init)
        self.content_bias = layers.Table((N, H), nn.initializers.zeros)
        self.position_bias = layers.Table((N, H), nn.initializers.zeros)
        self.relative = layers.Table((N, F, H), init)
        self.attend = layers.Attend(self.fn)
        self.out = layers.OutputProjection(self.dtype)

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says what each token sees, as `convolve` honours it."""
        q, k, v = self._convolve(self._project(x), mask)
        return self._attend(q, k, v, x.shape[-1], mask=mask)

    def init_state(self, batch: int, length: int) -> State:
        """Nothing seen yet, with room for `length` tokens."""
        N, H, dtype = self.num_heads, self.head_dim, self.dtype or jnp.float32
        cache = decode.KVCache.empty(batch, length, N, H, H, dtype)
        return State(cache, jnp.zeros((3, batch, self.kernel_size - 1, N, H), dtype))

    def extend(self, state: State, x: Float[Array, "B T D"]) -> tuple[State, Float[Array, "B T D"]]:
        """The next T tokens, each of which sees those before it and itself."""
        T, before = x.shape[1], self.kernel_size - 1
        raw = jnp.concatenate([state.recent, self._project(x)], 2)
        q, k, v = (y[:, before:] for y in self._convolve(raw, masks.Causal()))
        cache = state.cache.append(k, v)
        causal = dict(mask=masks.Causal(), q_offset=state.cache.length)
        return State(cache, raw[:, :, T:]), self._attend(q, cache.k, cache.v, x.shape[-1], **causal)

    def _project(self, x):
        return jnp.stack([self.query(x), self.key(x), self.value(x)])

    def _convolve(self, raw, mask):
        return [convolve(x, c, mask=mask) for x, c in zip(raw, self.kernels(), strict=True)]

    def _attend(self, q, k, v, features, **options):
        learned = self.content_bias(), self.position_bias(), self.relative()
        return self.out(self.attend(q, k, v, *learned, **options), features)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
    q, k, v = draw(0, 3, 2, T, 4, 8)
    learned = dict(content_bias=draw(1, 4, 8), position_bias=draw(2, 4, 8))
    return dict(q=q, k=k, v=v, relative=draw(3, 4, 6, 8) / 3, **learned)


def _oracle(q, k, v, content_bias, position_bias, relative, *, mask=None):
    T, S, F = q.shape[1], k.shape[1], relative.shape[1]
    offset = jnp.arange(T)[:, None] - jnp.arange(S)[None]
    angle = offset[..., None] * 10_000.0 ** (-2 * jnp.arange(F // 2) / F)[None, None]
    r = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1).astype(q.dtype)
    r = jnp.einsum("TSF,NFH->TSNH", r, relative)
    content = jnp.einsum("BTNH,BSNH->BNTS", q + content_bias[None, None], k)
    position = jnp.einsum("BTNH,TSNH->BNTS", q + position_bias[None, None], r)
    x = (content + position) / jnp.sqrt(q.shape[-1])
    x = jnp.where(masks.dense(mask, T, S), x, -1e30)
    return jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(x), v)


SPEC = registry.Mechanism(
    fn=rcmha,
    module=Rcmha,
    small=dict(num_heads=4, head_dim=8),
    papers=("rcmha",),
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
            Claim.LINEAR_MEMORY,
            Claim.CONTEXT_PARALLEL,
            Claim.FORWARD_MODE,
        }
    ),
    context=("gather",),
)
