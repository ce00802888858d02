"""The module around attention by queries, keys and values whose cache may lie in pages."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.core import attention, decode, layers, paging


class PagedKeyValueAttention(attention.KeyValueAttention):
    """Streams through pages of `page_size` tokens where it is given, else as its base class does.

    A subclass gives `fn` and `paged_fn`: (q: B T N H, cache, *, q_offset: B) -> B T N H. Each
    sequence of a paged cache has a length of its own, and its positions go by that.
    """

    page_size: int | None = None
    paged_fn: Callable[..., jax.Array] | None = None

    def setup(self):
        super().setup()
        self.attend_pages = layers.Attend(self.paged_fn)

    def init_state(self, batch: int, length: int) -> decode.KVCache | paging.PagedCache:
        """An empty cache for `length` tokens of each sequence."""
        if self.page_size is None:
            return super().init_state(batch, length)
        K, H, dtype = self.num_kv_heads or self.num_heads, self.head_dim, self.dtype or jnp.float32
        sizes = batch, length, K, H, H
        return paging.PagedCache.empty(*sizes, dtype, page_size=self.page_size)

    def extend(
        self, state: decode.KVCache | paging.PagedCache, x: Float[Array, "B T D"]
    ) -> tuple[decode.KVCache | paging.PagedCache, Float[Array, "B T D"]]:
        """The next T tokens, each of which sees those before it and itself."""
        if not isinstance(state, paging.PagedCache):
            return super().extend(state, x)
        q, k, v = paging.projected(self._project, x, state.lengths)
        cache = state.append(k, v)
        return cache, self.out(self.attend_pages(q, cache, q_offset=state.lengths), x.shape[-1])
