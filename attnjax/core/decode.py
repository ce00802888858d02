"""The streaming protocol: a sequence taken piece by piece through a state.

A streamable module has, beside `__call__`, two methods:

    init_state(batch, length) -> state                       before the first token
    extend(state, x: B T D) -> (state, y: B T D)             the next T tokens, T >= 1

`extend` by single tokens is decoding, by a prompt is prefill, and by chunks is chunked prefill;
all give the same outputs and the same state. `length` is the most tokens a state must hold; a
recurrent state holds any number and ignores it by its nature.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

State = Any  # a pytree of arrays


class Streaming(Protocol):
    """What a streamable module can do; both methods are called through `module.apply`."""

    def init_state(self, batch: int, length: int) -> State: ...

    def extend(
        self, state: State, x: Float[Array, "B T D"]
    ) -> tuple[State, Float[Array, "B T D"]]: ...


class KVCache(NamedTuple):
    """Keys and values seen so far, in arrays of a fixed size. `length` of them are filled.

    Appending more than fit overwrites the end: a caller asks for enough in `init_state`.
    """

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K V"]
    length: Int[Array, ""]

    @classmethod
    def empty(
        cls, batch: int, length: int, num_kv_heads: int, H: int, V: int, dtype: DTypeLike
    ) -> "KVCache":
        """A cache for `length` tokens."""
        k = jnp.zeros((batch, length, num_kv_heads, H), dtype)
        v = jnp.zeros((batch, length, num_kv_heads, V), dtype)
        return cls(k, v, jnp.zeros((), jnp.int32))

    def append(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K V"]) -> "KVCache":
        """The cache with T more tokens."""
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
            old, new.astype(old.dtype), self.length, 1
        )
        return KVCache(write(self.k, k), write(self.v, v), self.length + k.shape[1])
