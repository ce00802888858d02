r"""Pointer network: the weights of additive attention are the output, a choice among the inputs.

Paper: Vinyals et al., "Pointer Networks", arXiv:1506.03134, section 2.3.

    u_ts = w . tanh(W_1 e_s + W_2 d_t)          q = W_2 d (decoder),  k = W_1 e (encoder)
    p(choice t = s) = softmax_s(u_ts)

So the number of choices is the number of inputs, whatever that was in training.
Shapes: B batch, T decoder steps, S inputs, H width of the scorer, D model dim.
Unlike the paper: encoder and decoder are the caller's; `decode_permutation` takes the best choice
at each step, without a beam.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from attnjax.core import layers, masks, registry
from attnjax.core.registry import Claim


def pointer_network(
    q: Float[Array, "B T H"],
    k: Float[Array, "B S H"],
    w: Float[Array, "H"],
    *,
    mask: masks.Mask | None = None,
) -> Float[Array, "B T S"]:
    """The distribution over inputs of each step, in q's dtype; O(T S H) memory.

    `mask` says what may be chosen; where nothing may, all probabilities are zero. Raises
    ValueError for a mask that differs between heads: there is one.
    """
    seen = masks.dense(mask, q.shape[1], k.shape[1])
    if seen.shape[1] != 1:
        raise ValueError(f"mask for {seen.shape[1]} heads must be for 1")
    exact = lambda x: x.astype(jnp.float32)
    u = jnp.tanh(exact(q)[:, :, None] + exact(k)[:, None]) @ exact(w)
    return jax.nn.softmax(u, where=seen[:, 0]).astype(q.dtype)


def decode_permutation(
    point: Callable[[Any, jax.Array, masks.Valid], tuple[Any, jax.Array]],
    state: Any,
    valid: Bool[Array, "B S"],
) -> Int[Array, "B S"]:
    """The best choice at each step among the valid inputs that were not chosen before.

    Args:
      point: (state, last: B, mask) -> (state, probabilities: B S), one step of a decoder. `last`
        is its last choice, -1 at the first step; `mask` is of what is left.
      state: a pytree, of the decoder before the first step.
      valid: the inputs to be put in order.

    Each row holds every valid input exactly once, and then -1.
    """
    B, S = valid.shape

    def step(carry, _):
        state, last, left = carry
        state, p = point(state, last, masks.Valid(left))
        best = jnp.argmax(jnp.where(left, p, -1.0), -1)  # -1: p of what is left may round to 0
        choice = jnp.where(left.any(-1), best, -1)
        return (state, choice, left & (jnp.arange(S)[None] != choice[:, None])), choice

    first = jnp.full(B, -1, jnp.int32)
    return jax.lax.scan(step, (state, first, valid), length=S)[1].T


class PointerNetwork(nn.Module):
    """Section 2.3 for decoder states x (B T D) and encoder states context (B S D)."""

    head_dim: int
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = pointer_network

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S F"],
        *,
        mask: masks.Mask | None = None,
    ) -> Float[Array, "B T S"]:
        """For each x a distribution over the context; `mask` says what may be chosen."""
        dense = functools.partial(layers.Dense, self.head_dim, use_bias=False, dtype=self.dtype)
        init = nn.initializers.normal(self.head_dim**-0.5)
        w = layers.Table((self.head_dim,), init, name="scorer")()
        q, k = dense(name="query")(x), dense(name="key")(context)
        return layers.Attend(self.fn, name="attend")(q, k, w, mask=mask)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k = jax.random.normal(key, (2, 2, T, 8))
    return dict(q=q, k=k, w=jax.random.normal(jax.random.fold_in(key, 1), (8,)))


def _oracle(q, k, w):
    u = lambda d, e: w @ jnp.tanh(d + e)
    one = lambda q, k: jax.nn.softmax(jax.vmap(lambda d: jax.vmap(lambda e: u(d, e))(k))(q))
    return jax.vmap(one)(q, k)


SPEC = registry.Mechanism(
    fn=pointer_network,
    module=PointerNetwork,
    small=dict(head_dim=16),
    papers=("pointer-network",),
    example=_example,
    oracle=_oracle,
    layout="cross",
    claims=frozenset({Claim.MASKABLE, Claim.CROSS, Claim.FORWARD_MODE}),
)
