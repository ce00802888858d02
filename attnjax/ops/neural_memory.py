r"""A memory that is a small network, trained on each token as it comes, by SGD with momentum.

    S_t = momentum_t S_{t-1} - rate_t grad |M(k_t) - v_t|^2 / 2       S: what the last steps were
    M_t = keep_t M_{t-1} + S_t,        o_t = M_t(q_t)
    M(x) = W_L^T silu(W_{L-1}^T silu(... W_1^T x))                    L = 1 is linear

The gradient is taken at M as it was before the chunk that token t is in: with chunks of one token
that is M_{t-1}, and with larger ones all of a chunk's gradients are found at once. In a linear
memory the M_{t-1} of many tokens are found at once too, by a triangular system, since

    M_t = kept_t M_0 + moved_t S_0 + sum_{r <= t} write_tr k_r u_r^T
    u_r = rate_r (v_r - M_{r-1}^T k_r)

with `write` the product of two triangles of decays, of the memory and of the momentum. Source:
Behrouz et al., "Titans: Learning to Memorize at Test Time", arXiv:2501.00663, sections 3.1 and 3.2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnjax.core import masks
from attnjax.ops import state_masks
from pallas_kernels.linear_recurrence import chunk as chunks

_EXACT = 64  # tokens of a linear memory that are taken at once


class State(NamedTuple):
    """A memory after `length` tokens; `anchor` is what it was when the chunk of the next began."""

    weights: Float[Array, "B N L H H"]
    momentum: Float[Array, "B N L H H"]
    anchor: Float[Array, "B N L H H"]
    length: Int[Array, ""]

    @classmethod
    def begin(cls, weights: Float[Array, "N L H H"], batch: int) -> "State":
        """Before the first token."""
        weights = jnp.broadcast_to(weights[None].astype(jnp.float32), (batch, *weights.shape))
        return cls(weights, jnp.zeros_like(weights), weights, jnp.zeros((), jnp.int32))


def neural_memory(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    rate: Float[Array, "B T N"],
    log_momentum: Float[Array, "B T N"],
    log_keep: Float[Array, "B T N"],
    state: State,
    *,
    mask: masks.Mask | None = None,
    chunk: int = 1,
    by: str = "neural_memory",
) -> tuple[Float[Array, "B T N H"], State]:
    """(o in v's dtype, state after the last token in float32). Always causal; O(T) time and memory.

    Args:
      rate: size of a step, >= 0; with |k| = 1 a linear memory without momentum is stable up to 2.
      log_momentum, log_keep: logarithms of the factors, finite and <= 0.
      state: before the first of these tokens, made with the same `chunk`.
      mask: Causal (which holds anyway) and Valid: a token that is not valid changes nothing.
      chunk: tokens whose gradients are taken at the same memory.
      by: who asks, for error messages.

    Raises NotImplementedError for any other mask, ValueError for chunk < 1 or no tokens.
    """
    T, L = q.shape[1], state.weights.shape[2]
    if chunk < 1 or T == 0:
        raise ValueError(f"{chunk=} and {T=} must be at least 1")
    rates = [x[..., None] for x in (rate, log_momentum, log_keep)]
    tokens = (q, k, v, *rates, _seen(mask, k, by))
    if L == 1 and chunk == 1:
        o, state = _scan(_exact, tokens, state, chunk, min(_EXACT, T), 0)
    else:
        size = chunk if T > 1 else 1
        o, state = _scan(_frozen, tokens, state, chunk, size, state.length % size)
    return o.astype(v.dtype), state


def _scan(body, tokens, state, chunk, size, start):
    """(outputs, state) by `size` tokens at once, of which `start` came before these."""
    B, T, *rest = tokens[0].shape
    spare = 0 if isinstance(start, int) else size - 1  # where it is traced it may be any
    cut = [_cut(x, start, -(-(T + spare) // size), size) for x in tokens]
    heads, last = jax.vmap(jax.vmap(body)), state.length + T

    @jax.checkpoint
    def step(carry, x):
        end, *x = x
        weights, momentum, o = heads(*carry, *x)
        begins = (end % chunk == 0) & (end <= last)  # a chunk, after these tokens
        return (weights, momentum, jnp.where(begins, weights, carry[2])), o

    ends = state.length - start + size * jnp.arange(1, len(cut[0]) + 1)
    carry, o = jax.lax.scan(step, tuple(state[:3]), (ends, *cut))
    o = o.transpose(1, 0, 3, 2, 4).reshape(B, -1, *rest)
    return jax.lax.dynamic_slice_in_dim(o, start, T, 1), State(*carry, last)


def _seen(mask, k, by):
    """1 for a token that the memory learns, else 0: (B T N 1)."""
    _, valid = masks.select(mask, masks.Causal, masks.Valid, by=by)
    return state_masks.only_valid(jnp.ones((*k.shape[:3], 1)), valid)


def _cut(x, start, count, size):
    """(B T N F) -> (count B N size F) in float32, the first token at `start`, zeros around."""
    B, _, *rest = x.shape
    room = jnp.zeros((B, count * size, *rest))
    x = jax.lax.dynamic_update_slice_in_dim(room, x.astype(jnp.float32), start, 1)
    return x.reshape(B, count, size, *rest).transpose(1, 0, 3, 2, 4)


def _read(weights, x):
    """M(x) of (L H H) and (H)."""
    x = weights[0].T @ x
    for layer in weights[1:]:
        x = layer.T @ jax.nn.silu(x)
    return x


def _frozen(weights, momentum, anchor, q, k, v, rate, log_momentum, log_keep, seen):
    """(weights, momentum, outputs) of one head after a chunk whose gradients are at `anchor`."""
    loss = lambda weights, k, v: ((_read(weights, k) - v) ** 2).sum() / 2
    gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(anchor, k, v)
    steps = -(rate * seen)[..., None, None] * gradients  # (C L H H)
    (kept, moved, write), (slowed, last) = _mixing(log_momentum, log_keep, seen)
    state = jnp.stack([weights, momentum])
    after = jnp.einsum("TI,ILHV->TLHV", jnp.stack([kept, moved], 1), state)
    after = after + jnp.einsum("TR,RLHV->TLHV", write, steps)
    momentum = slowed * momentum + jnp.einsum("R,RLHV->LHV", last, steps)
    return after[-1], momentum, jax.vmap(_read)(after, q)


def _exact(weights, momentum, _, q, k, v, rate, log_momentum, log_keep, seen):
    """As _frozen for a linear memory, each gradient at the memory of the token before."""
    M, S = weights[0], momentum[0]
    (kept, moved, write), (slowed, last) = _mixing(log_momentum, log_keep, seen)
    before = lambda x, first: jnp.concatenate([jnp.full_like(x[:1], first), x[:-1]])
    recall = lambda x, kept, moved: kept[:, None] * (x @ M) + moved[:, None] * (x @ S)
    rate = rate * seen
    error = v - recall(k, before(kept, 1), before(moved, 0))
    u = chunks.solve(rate * before(write, 0) * (k @ k.T), rate * error)
    o = recall(q, kept, moved) + (write * (q @ k.T)) @ u
    M = kept[-1] * M + moved[-1] * S + (write[-1][:, None] * k).T @ u
    S = slowed * S + (last[:, None] * k).T @ u
    return M[None], S[None], o


def _mixing(log_momentum, log_keep, seen):
    """What each token's memory, and the last momentum, are made of.

    ((of the weights (C), of the momentum (C), of each token's step (C C)) in the memories,
    (of the momentum, of each token's step (C)) in the last momentum)
    """
    slowed, pushed = _fade(log_momentum * seen)
    kept, added = _fade(log_keep * seen)
    added = added * seen.T  # a token that is not seen adds no momentum to the memory
    return (kept, added @ slowed, added @ pushed), (slowed[-1], pushed[-1])


def _fade(log_decay):
    """exp of the sums of (C 1) from the first token to each (C), and after s to t >= s (C C)."""
    g = jnp.cumsum(log_decay, 0)
    past = jnp.tril(jnp.ones((len(g), len(g)), bool))
    return jnp.exp(g[:, 0]), jnp.exp(jnp.where(past, g - g.T, -jnp.inf))
