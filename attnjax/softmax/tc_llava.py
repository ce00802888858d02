r"""TC-LLaVA: tokens of one frame of a video see each other, and positions know of frames.

Paper: Gao et al., "TC-LLaVA: Rethinking the Transfer from Image to Video Understanding with
Temporal Considerations", arXiv:2409.03206: Temporal-Aware Dual RoPE and Frame-wise Block Causal
Attention Mask.

    x_ij = q_i turned by p_i . k_j turned by p_j / sqrt(H),        p_i = i + gamma t_i
    o_i  = sum_j softmax_j(x_ij) v_j             over j <= i, and over those with t_j = t_i

t is a time: each token of text has one of its own, and all tokens of a frame have one together, so
that t counts frames as if they were tokens (`clock`). A score depends on the distance in tokens and
on the distance in time. Text is seen causally, and nothing sees a later frame.

        text  frame  frame  text
    t   0  1  2  2   3  3   4
        x  .  .  .   .  .   .
        x  x  .  .   .  .   .
        x  x  x  x   .  .   .
        x  x  x  x   .  .   .
        x  x  x  x   x  x   .
        x  x  x  x   x  x   .
        x  x  x  x   x  x   x

Shapes: B batch, T queries, S keys, N heads, K kv-heads, H head dim, V value dim, D model dim.
Unlike the paper: how it puts the two positions together, which gamma it takes and how it counts
time in text is not known here; a sum of angles is what keeps both distances. What this does for
questions about videos the paper shows by training, and nothing here does.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnjax.core import attention, decode, masks, positions, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops


def tc_llava(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    times: Int[Array, "B S"],
    *,
    time_scale: float = 1.0,
    rotary_base: float | None = 10_000.0,
    mask: masks.Mask | None = None,
    score_mod: Callable[..., jax.Array] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """o in v's dtype. Other options: `ops.dot_product_attention`.

    Args:
      times: t of the tokens by position, queries' too.
      time_scale, rotary_base: gamma, and the base of the rotation; None is no rotation.
      mask: what else limits what a token sees; `masks.Causal()` leaves plain causal attention.

    Raises ValueError for an odd H that is to be rotated.
    """
    if rotary_base is not None:
        at = jnp.arange(k.shape[1])[None] + time_scale * times
        now = jax.lax.dynamic_slice_in_dim(at, q_offset, q.shape[1], 1)
        q, k = (_turn(x, p, rotary_base) for x, p in ((q, now), (k, at)))
    seen = masks.Causal() | masks.Segments(times)
    seen = seen if mask is None else seen & mask
    options = dict(score_mod=score_mod, q_offset=q_offset, implementation=implementation)
    return ops.dot_product_attention(q, k, v, mask=seen, **options)


def _turn(x: Float[Array, "B T N H"], at: Float[Array, "B T"], base: float):
    one = lambda x, p: positions.rotary_grid(x[None], p[:, None], base=base)[0]
    return jax.vmap(one)(x, at)


def clock(frames: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """t of tokens by the number of their frame, -1 for text; a frame is one run of tokens."""
    before = jnp.pad(frames, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return jnp.cumsum((frames < 0) | (frames != before), 1) - 1


class State(NamedTuple):
    """Keys and values, and the times of all tokens: -1 of those that are not there yet."""

    cache: decode.KVCache
    times: Int[Array, "B S"]


class TcLlava(attention.KeyValueAttention):
    """Attention over (B T D) to text and frames. Without `frames` all is text, seen causally."""

    rotary_base: float | None = 10_000.0
    time_scale: float = 1.0
    fn: Callable[..., jax.Array] = tc_llava

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: masks.Mask | None = None,
        frames: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `frames` as in `clock`."""
        times = clock(_all_text(x) if frames is None else frames)
        return self._attend(x, self.query(x), self.key(x), self.value(x), times, mask=mask)

    def init_state(self, batch: int, length: int) -> State:
        """An empty cache for `length` tokens."""
        cache = super().init_state(batch, length)
        return State(cache, jnp.full((batch, length), -1, jnp.int32))

    def extend(
        self,
        state: State,
        x: Float[Array, "B T D"],
        *,
        frames: Int[Array, "B T"] | None = None,
    ) -> tuple[State, Float[Array, "B T D"]]:
        """The next T tokens, in which each frame is whole."""
        cache, length = state.cache.append(self.key(x), self.value(x)), state.cache.length
        last = jax.lax.dynamic_slice_in_dim(state.times, length - 1, 1, 1)  # -1 before the first
        new = last + 1 + clock(_all_text(x) if frames is None else frames)
        times = jax.lax.dynamic_update_slice_in_dim(state.times, new, length, 1)
        y = self._attend(x, self.query(x), cache.k, cache.v, times, q_offset=length)
        return State(cache, times), y

    def _attend(self, x, q, k, v, times, **options):
        options |= dict(time_scale=self.time_scale, rotary_base=self.rotary_base)
        return self.out(self.attend(q, k, v, times, **options), x.shape[-1])


def _all_text(x):
    return jnp.full(x.shape[:2], -1, jnp.int32)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    frames = jnp.arange(T)[None] // jnp.array([[3], [5]])
    return dict(q=q, k=k, v=v, times=clock(jnp.where(frames % 4 == 0, -1, frames)))


def _oracle(q, k, v, times, *, time_scale=1.0, rotary_base=1e4, mask=None):
    (T, S), half = (q.shape[1], k.shape[1]), q.shape[-1] // 2
    p = jnp.arange(S)[None] + time_scale * times
    angle = p[:, :, None, None] * rotary_base ** -(jnp.arange(half) / half)[None, None, None]
    turn = lambda x: (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angle[:, : x.shape[1]])
    x = jnp.einsum("BTNH,BSNH->BNTS", turn(q), turn(k).conj()).real / jnp.sqrt(2 * half)
    same = times[:, :T, None] == times[:, None, :]
    seen = (same | jnp.tril(jnp.ones((T, S), bool))[None])[:, None] & masks.dense(mask, T, S)
    return jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(jnp.where(seen, x, -1e30)), v)


SPEC = registry.Mechanism(
    fn=tc_llava,
    module=TcLlava,
    small=dict(num_heads=4, head_dim=8),
    papers=("tc-llava",),
    example=_example,
    oracle=_oracle,
    variants=(
        {},
        dict(time_scale=0.5, rotary_base=50.0, implementation="blocked"),
        dict(mask=masks.Causal()),
    ),
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
