r"""Slot attention: slots compete for the inputs, and each becomes the mean of what it won.

Paper: Locatello et al., "Object-Centric Learning with Slot Attention", arXiv:2006.15055,
algorithm 1 and eqs. 1 and 2.

    x_ms = q_m . k_s / sqrt(H)          q = W_q norm(slots),  k = W_k norm(inputs),  v = W_v ...
    a_ms = exp(x_ms) / sum_m' exp(x_m's) + epsilon        the share of input s that slot m gets
    u_m  = sum_s a_ms v_s / sum_s a_ms                    the mean of its inputs, by share
    slots <- GRU(slots, u);   slots <- slots + MLP(norm(slots));        and again from the top

The softmax runs over the slots, where attention has it over the keys: that is the competition.
Shapes: B batch, S inputs, M slots, N heads, H head dim, V value dim, D model dim.
Unlike the paper: any number of heads, each with a competition of its own (the paper has one); the
logarithm of sigma is learned; slots may start from learned ones instead of random ones.
"""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from attnjax.core import layers, masks, registry
from attnjax.core.registry import Claim


def slot_attention(
    q: Float[Array, "B M N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N V"],
    *,
    mask: masks.Mask | None = None,
    epsilon: float = 1e-8,
) -> Float[Array, "B M N V"]:
    """One update of the slots (eqs. 1 and 2), in v's dtype; `mask` may be Valid.

    `epsilon` is added to every share, so that a slot that wins nothing gets the mean of all.
    Raises NotImplementedError for another mask.
    """
    masks.select(mask, masks.Valid, by="slot_attention")
    M, S = q.shape[1], k.shape[1]
    x = jnp.einsum("BMNH,BSNH->BNMS", q, k, preferred_element_type=jnp.float32)
    share = jax.nn.softmax(x * q.shape[-1] ** -0.5, axis=2) + epsilon
    share = jnp.where(masks.dense(mask, M, S), share, 0.0)
    total = share.sum(-1, keepdims=True)
    weights = share / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("BNMS,BSNV->BMNV", weights, v.astype(jnp.float32)).astype(v.dtype)


def draw_slots(
    key: Key[Array, ""], mean: Float[Array, "D"], log_sigma: Float[Array, "D"], batch: int, M: int
) -> Float[Array, "B M D"]:
    """M slots for each of `batch` sets, independent and from one normal distribution."""
    noise = jax.random.normal(key, (batch, M, mean.shape[0]))
    return mean[None, None] + jnp.exp(log_sigma)[None, None] * noise


def gru(
    state: Float[Array, "*B D"], by_input: Float[Array, "*B 3*D"], by_state: Float[Array, "*B 3*D"]
) -> Float[Array, "*B D"]:
    """A gated recurrent unit, given what its input and its state say about reset, keep and new.

    Source: Cho et al., arXiv:1406.1078, with the reset applied after the product, in float32.
    """
    reset, keep, new = jnp.split(by_input.astype(jnp.float32), 3, -1)
    more_reset, more_keep, old = jnp.split(by_state.astype(jnp.float32), 3, -1)
    reset, keep = jax.nn.sigmoid(reset + more_reset), jax.nn.sigmoid(keep + more_keep)
    return keep * state + (1 - keep) * jnp.tanh(new + reset * old)


class SlotAttention(nn.Module):
    """Algorithm 1: (B S D) -> (B num_slots D), in an order that means nothing.

    initial: "drawn" slots differ by noise alone (random stream "noise"), so a trained module can
    be used with another `num_slots`; "learned" ones are parameters, one for each slot.
    """

    num_slots: int
    num_heads: int = 1
    head_dim: int = 64
    num_iterations: int = 3
    mlp_dim: int = 128
    initial: Literal["drawn", "learned"] = "drawn"
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = slot_attention

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B M D"]:
        """The slots after `num_iterations` updates; ValueError for an unknown `initial`."""
        B, _, D = x.shape
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        dense = functools.partial(layers.Dense, dtype=self.dtype)
        heads = functools.partial(layers.HeadProjection, self.num_heads, self.head_dim, self.dtype)
        inputs, slots = norm(name="input_norm")(x), self._initial(B, D)
        k, v, query = heads(name="key")(inputs), heads(name="value")(inputs), heads(name="query")
        query_norm, mlp_norm = norm(name="query_norm"), norm(name="mlp_norm")
        by_input, by_state = dense(3 * D, name="by_input"), dense(3 * D, name="by_state")
        up, down = dense(self.mlp_dim, name="up"), dense(D, name="down")
        attend = layers.Attend(self.fn, name="attend")
        for _ in range(self.num_iterations):
            updates = attend(query(query_norm(slots)), k, v, mask=mask)
            updates = updates.reshape(*updates.shape[:2], -1)
            slots = gru(slots, by_input(updates), by_state(slots))
            slots = slots + down(nn.relu(up(mlp_norm(slots))))
        return slots.astype(x.dtype)

    def _initial(self, B, D):
        M = self.num_slots
        if self.initial == "learned":
            slots = layers.Table((M, D), nn.initializers.normal(1.0), name="slots")()
            return jnp.broadcast_to(slots[None], (B, M, D))
        if self.initial != "drawn":
            raise ValueError(f"initial={self.initial!r} must be 'drawn' or 'learned'")
        mean = layers.Table((D,), name="mean")()
        log_sigma = layers.Table((D,), nn.initializers.zeros, name="log_sigma")()
        return draw_slots(self.make_rng("noise"), mean, log_sigma, B, M)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    slots, inputs = jax.random.split(key)
    k, v = jax.random.normal(inputs, (2, 2, T, 2, 8))
    return dict(q=jax.random.normal(slots, (2, 6, 2, 8)), k=k, v=v)


def _oracle(q, k, v, *, epsilon=1e-8):
    def one(slots, inputs, values):  # of one set and head: (M H), (S H), (S V)
        attn = jax.nn.softmax(inputs @ slots.T / jnp.sqrt(slots.shape[1]), axis=1) + epsilon
        return (attn / attn.sum(0, keepdims=True)).T @ values

    return jax.vmap(jax.vmap(one, 1, 1))(q, k, v)


SPEC = registry.Mechanism(
    fn=slot_attention,
    module=SlotAttention,
    small=dict(num_slots=3, num_heads=2, head_dim=8, mlp_dim=16),
    papers=("slot-attention",),
    example=_example,
    oracle=_oracle,
    layout="set",
    variants=({}, dict(epsilon=0.1)),
    claims=frozenset(
        {
            Claim.MASKABLE,
            Claim.CROSS,
            Claim.PERMUTATION_INVARIANT,
            Claim.DENSE_TWIN,
            Claim.LINEAR_MEMORY,
            Claim.LINEAR_COMPUTE,
            Claim.FORWARD_MODE,
        }
    ),
)
