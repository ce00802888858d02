"""The module around every softmax attention that has queries, keys and values for itself."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import decode, layers, masks, positions


class KeyValueAttention(nn.Module):
    """Projections, an optional rotation by position, one call of `fn`, and a cache to stream.

    A subclass gives `fn`: (q: B T N H, k: B S K H, v: B S K H, *, mask, q_offset) -> B T N H.
    num_kv_heads None is num_heads. rotary_base None is no rotation. Streaming is causal.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    rotary_base: float | None = None
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] | None = None

    def setup(self):
        N, K, H = self.num_heads, self.num_kv_heads or self.num_heads, self.head_dim
        if N % K:
            raise ValueError(f"num_heads={N} must be a multiple of num_kv_heads={K}")
        self.query = layers.HeadProjection(N, H, self.dtype)
        self.key = layers.HeadProjection(K, H, self.dtype)
        self.value = layers.HeadProjection(K, H, self.dtype)
        self.attend = layers.Attend(self.fn)
        self.out = layers.OutputProjection(self.dtype)

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says what each token sees."""
        q, k, v = self._project(x, jnp.arange(x.shape[1]))
        return self.out(self.attend(q, k, v, mask=mask), x.shape[-1])

    def init_state(self, batch: int, length: int) -> decode.KVCache:
        """An empty cache for `length` tokens."""
        K, H = self.num_kv_heads or self.num_heads, self.head_dim
        return decode.KVCache.empty(batch, length, K, H, H, self.dtype or jnp.float32)

    def extend(
        self, state: decode.KVCache, x: Float[Array, "B T D"]
    ) -> tuple[decode.KVCache, Float[Array, "B T D"]]:
        """The next T tokens, each of which sees those before it and itself."""
        q, k, v = self._project(x, state.length + jnp.arange(x.shape[1]))
        cache = state.append(k, v)
        o = self.attend(q, cache.k, cache.v, mask=masks.Causal(), q_offset=state.length)
        return cache, self.out(o, x.shape[-1])

    def _project(self, x, at):
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.rotary_base is not None:
            q = positions.rotary(q, at, base=self.rotary_base)
            k = positions.rotary(k, at, base=self.rotary_base)
        return q, k, v
