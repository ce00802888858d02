r"""DuoAttention: a full cache for the heads that retrieve, a short one for those that don't.

Paper: Xiao et al., "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and
Streaming Heads", arXiv:2410.10819, sections 2.2 (finding the heads) and 2.3 (deployment).

    streaming head: sees s where s <= t and (s < sinks or t - s < recent)
    finding:        o_n  = alpha_n full_n + (1 - alpha_n) streaming_n,  a gate for each key head
                    loss = mean |h_gated - h_full|^2 + weight * sum_n |alpha_n|
    deployment:     the key heads with the largest gates keep the full cache

A streaming head keeps `sinks` slots for the first tokens and a ring of `recent` for the others:
token p lies in slot p, or in slot sinks + (p - sinks) mod recent, so that the number of tokens
seen says what each slot holds. Keys are kept as rotated for their true positions.

Shapes: B batch, T queries, S keys, M slots, N heads, K key heads, F of them that retrieve, H head
dim, V value dim, L layers.
Unlike the paper: the distance is a mean over features, as in the authors' code; equal gates are
told apart by their order instead of by noise.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from attnjax.core import decode, masks, registry
from attnjax.ops import dot_product_attention as ops

_NOWHERE = np.iinfo(np.int32).max  # the position of an empty slot: after every query


class State(NamedTuple):
    """What is kept: every token for the F retrieval heads, the slots of M tokens for the others."""

    full_k: Float[Array, "B S F H"]
    full_v: Float[Array, "B S F V"]
    short_k: Float[Array, "B M K-F H"]
    short_v: Float[Array, "B M K-F V"]
    length: Int[Array, ""]  # tokens seen


def streaming_mask(sinks: int, recent: int) -> masks.Mask:
    """What a streaming head sees."""
    return masks.Causal() & (masks.Prefix(sinks) | masks.Window(recent - 1))


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which key heads retrieve, and how many tokens the others keep."""

    retrieval: tuple[bool, ...]
    sinks: int = 4
    recent: int = 12

    def __post_init__(self):
        if self.sinks < 0 or self.recent < 1:
            raise ValueError(f"{self} must have sinks of at least 0 and recent of at least 1")

    def empty(
        self, batch: int, length: int, num_kv_heads: int, H: int, V: int, dtype: DTypeLike
    ) -> State:
        """The state before the first of `length` tokens; ValueError for another number of heads."""
        if num_kv_heads != len(self.retrieval):
            raise ValueError(f"{num_kv_heads=} must be {len(self.retrieval)}, one per gate")
        F, M = sum(self.retrieval), self.sinks + self.recent
        full = [jnp.zeros((batch, length, F, size), dtype) for size in (H, V)]
        short = [jnp.zeros((batch, M, num_kv_heads - F, size), dtype) for size in (H, V)]
        return State(*full, *short, jnp.zeros((), jnp.int32))

    def entries(self, batch: int, length: int, H: int, V: int) -> int:
        """How many numbers the keys and values of the state are."""
        full = sum(self.retrieval)
        tokens = full * length + (len(self.retrieval) - full) * (self.sinks + self.recent)
        return batch * (H + V) * tokens

    def extend(
        self,
        attend: Callable[..., jax.Array],
        state: State,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K V"],
    ) -> tuple[State, Float[Array, "B T N V"]]:
        """The next T tokens, and what their queries get from both kinds of heads.

        Each kind is a call of attend(q, k, v, mask=..., positions=(of queries, of keys)).
        """
        B, T, K, V = v.shape
        order = np.argsort(~np.asarray(self.retrieval), stable=True)  # retrieval heads first
        first, last = np.split(order, [sum(self.retrieval)])
        q = q.reshape(B, T, K, -1, q.shape[-1])
        part = lambda heads: [x[:, :, heads] for x in (q, k, v)]
        *full, a = _extend_full(attend, state, *part(first))
        *short, b = self._extend_short(attend, state, *part(last))
        o = jnp.concatenate([a, b], 2)[:, :, np.argsort(order)]
        return State(*full, *short, state.length + T), o.reshape(B, T, -1, V)

    def _extend_short(self, attend, state, q, k, v):
        """Attend to the old slots and the new tokens, then keep those that stay."""
        after = lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], 1)
        k, v = after(state.short_k, k), after(state.short_v, v)
        M, T = self.sinks + self.recent, q.shape[1]
        new, held = state.length + jnp.arange(T), self._held(state.length)
        at = jnp.concatenate([jnp.where(held < 0, _NOWHERE, held), new])
        mask = streaming_mask(self.sinks, self.recent)
        o = _attend(attend, q, k, v, mask=mask, positions=(new, at))
        held = self._held(state.length + T)
        source = jnp.where(held < state.length, jnp.arange(M), M + held - state.length)
        return k[:, source], v[:, source], o

    def _held(self, length) -> Int[Array, "M"]:
        """The position of the token in each slot after `length` tokens; -1 where there is none."""
        slot = np.arange(self.sinks + self.recent)
        latest = length - 1 - (length - 1 - slot) % self.recent
        held = jnp.where(slot < self.sinks, slot, latest)
        return jnp.where((held < length) & (held >= np.minimum(slot, self.sinks)), held, -1)


def _extend_full(attend, state, q, k, v):
    cache = decode.KVCache(state.full_k, state.full_v, state.length).append(k, v)
    at = state.length + jnp.arange(q.shape[1]), jnp.arange(cache.k.shape[1])
    return cache.k, cache.v, _attend(attend, q, cache.k, cache.v, mask=masks.Causal(), positions=at)


def _attend(attend, q, k, v, **options):
    """Over q (B T K G H), where K may be 0: (B T K G V)."""
    B, T, K, G, _ = q.shape
    if K == 0:
        return jnp.zeros((B, T, K, G, v.shape[-1]), v.dtype)
    return attend(q.reshape(B, T, K * G, -1), k, v, **options).reshape(B, T, K, G, -1)


def duoattention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K V"],
    *,
    retrieval: tuple[bool, ...] = (True, False),
    sinks: int = 4,
    recent: int = 12,
) -> tuple[Float[Array, "B T N V"], State]:
    """A prompt taken at once: its outputs, and the state from which to decode on."""
    policy = Policy(retrieval, sinks, recent)
    state = policy.empty(*k.shape, v.shape[-1], k.dtype)
    state, o = policy.extend(ops.dot_product_attention, state, q, k, v)
    return o, state


def gated(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K V"],
    gates: Float[Array, "K"],
    *,
    sinks: int = 4,
    recent: int = 12,
) -> Float[Array, "B T N V"]:
    """The mix of full and streaming attention by which gates are found (section 2.2)."""
    full = ops.dot_product_attention(q, k, v, mask=masks.Causal())
    streaming = ops.dot_product_attention(q, k, v, mask=streaming_mask(sinks, recent))
    alpha = jnp.repeat(gates, q.shape[2] // k.shape[2])[None, None, :, None].astype(v.dtype)
    return alpha * full + (1 - alpha) * streaming


def gate_loss(
    gated_hidden: Float[Array, "B T D"],
    full_hidden: Float[Array, "B T D"],
    answers: Bool[Array, "B T"],
    gates: Float[Array, "L K"],
    *,
    weight: float = 0.05,
) -> Float[Array, ""]:
    """Distance of the last hidden states where the answers are, plus the size of all gates."""
    distance = jnp.mean((gated_hidden - full_hidden).astype(jnp.float32) ** 2, -1)
    distance = jnp.sum(distance, where=answers) / jnp.maximum(answers.sum(), 1)
    return distance + weight * jnp.abs(gates).sum()


def binarise(gates: Float[Array, "L K"], *, full: float = 0.5) -> Bool[np.ndarray, "L K"]:
    """Which heads retrieve: the share `full` of all layers' heads, those with the largest gates.

    The shape of a state depends on the answer, so gates must be concrete.
    """
    if not 0 <= full <= 1:
        raise ValueError(f"{full=} must be in [0, 1]")
    rank = np.argsort(np.argsort(-np.asarray(gates), axis=None, kind="stable"))
    return (rank < round(full * gates.size)).reshape(gates.shape)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k[:, :, :2], v=v[:, :, :2])


def _untouched(q, k, v):
    """Causal attention, and a cache of every token."""
    state = Policy((True, True)).empty(*k.shape, v.shape[-1], k.dtype)
    state = state._replace(full_k=k, full_v=v, length=state.length + k.shape[1])
    return ops.dot_product_attention(q, k, v, mask=masks.Causal()), state


def _oracle(q, k, v, *, retrieval=(True, False), sinks=4, recent=12):
    """A dense mask for each head, and slots that are written token by token."""
    B, T, N, H = q.shape
    t, s = jnp.arange(T)[:, None], jnp.arange(T)[None, :]
    near = (s < sinks) | (t - s < recent)
    seen = jnp.stack([(s <= t) & (near | keep) for keep in retrieval])
    x = jnp.einsum("BTKGH,BSKH->BKGTS", q.reshape(B, T, len(retrieval), -1, H), k) / jnp.sqrt(H)
    w = jax.nn.softmax(jnp.where(seen[None, :, None], x, -1e30))
    o = jnp.einsum("BKGTS,BSKV->BTKGV", w, v).reshape(B, T, N, -1)

    held = np.full(sinks + recent, -1)
    for p in range(T):
        held[p if p < sinks else sinks + (p - sinks) % recent] = p
    slots = lambda x: jnp.where((held >= 0)[None, :, None, None], x[:, held], 0)
    keep = np.array(retrieval)
    short = (slots(x[:, :, ~keep]) for x in (k, v))
    return o, State(k[:, :, keep], v[:, :, keep], *short, jnp.asarray(T, jnp.int32))


def _budget(q, k, v, *, retrieval=(True, False), sinks=4, recent=12):
    B, T, _, H = k.shape
    return Policy(retrieval, sinks, recent).entries(B, T, H, v.shape[-1])


SPEC = registry.Intervention(
    fn=duoattention,
    papers=("duoattention",),
    example=_example,
    oracle=_oracle,
    identity=dict(retrieval=(True, True)),
    untouched=_untouched,
    variants=({}, dict(retrieval=(False, False), sinks=0, recent=5)),
    size=lambda output: sum(x.size for x in output[1][:4]),
    budget=_budget,
)
