r"""MoA: every head gets a window of its own, which may grow with the length of the input.

Paper: Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model
Compression", arXiv:2406.14909, sections 3 (search space) and 4 (influence, optimisation).

    span_n(T) = alpha_n + beta_n T, in whole blocks; head n sees the keys of its last span_n tokens
                and the first `sinks`
    E_ts      = A_ts (sum_r g_tr A_tr - g_ts) / (1 - A_ts),      g = dL / dA
    plan      = for each head an (alpha, beta), so that the influence E of all that is hidden is the
                least while the mean of span_n(T) / T keeps a budget at every length T

E is what L gains, to first order in A, when s is hidden from t and the rest of the row is
normalised anew. The choice is a mixed-integer programme and is solved exactly. No training.

Shapes: B batch, T queries and keys, N heads, K key heads, H head dim, V value dim, P options of a
head, L lengths.
Unlike the paper: spans are those of key heads, whose cache they bound (the same without grouped
heads); lengths are weighed into one objective instead of a front of plans, from which a validation
at a new length would choose. The calibration texts are up to the caller.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy import optimize

from attnjax.core import masks, registry
from attnjax.ops import dot_product_attention as ops

Span = tuple[int, float]
"""(alpha, beta): alpha tokens and beta of the length."""


def moa_sparse_spans(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K V"],
    *,
    spans: tuple[Span, ...] = ((64, 0.0), (0, 0.5)),
    sinks: int = 64,
    block: int = 64,
) -> Float[Array, "B T N V"]:
    """Causal attention, each key head with its span; heads of one span are computed together.

    Args:
      spans: for each key head; (0, 1.0) is full attention.
      sinks: first tokens that all heads see.
      block: spans are rounded up to multiples of it.

    Returns v's dtype. Raises ValueError for another number of spans, and for one below 0.
    """
    (B, T, N, H), K = q.shape, k.shape[2]
    if len(spans) != K:
        raise ValueError(f"{spans=} must be {K}, one for each key head")
    sizes = np.array([tokens(span, T, block) for span in spans])
    parts, heads = [], []
    q = q.reshape(B, T, K, N // K, H)
    for size in np.unique(sizes):
        alike = np.flatnonzero(sizes == size)
        queries = q[:, :, alike].reshape(B, T, -1, H)
        mask = visible(int(size), sinks)
        o = ops.dot_product_attention(queries, k[:, :, alike], v[:, :, alike], mask=mask)
        parts.append(o.reshape(B, T, len(alike), N // K, -1))
        heads.append(alike)
    o = jnp.concatenate(parts, 2)[:, :, np.argsort(np.concatenate(heads))]
    return o.reshape(B, T, N, -1)


def tokens(span: Span, length: int, block: int) -> int:
    """How many tokens a span is at a length: whole blocks, and at least one."""
    alpha, beta = span
    if alpha < 0 or beta < 0 or block < 1:
        raise ValueError(f"{span=} must not be negative, and {block=} at least 1")
    return max(1, int(np.ceil((alpha + beta * length) / block))) * block


def visible(size: int, sinks: int) -> masks.Mask:
    """What a head with a span of `size` tokens sees."""
    return masks.Causal() & (masks.Prefix(sinks) | masks.Window(size - 1))


def influence(
    weights: Float[Array, "*B T S"], gradient: Float[Array, "*B T S"]
) -> Float[Array, "*B T S"]:
    """E of every entry, from the weights and a loss's gradient by them.

    Where a weight is 1 nothing is left to normalise, and E is the loss of the entry alone.
    """
    rest = 1 - weights
    mean = (weights * gradient).sum(-1, keepdims=True)
    shifted = weights * (mean - gradient) / jnp.where(rest > 0, rest, 1.0)
    return jnp.where(rest > 0, shifted, -gradient)


def hidden(
    influence: Float[Array, "B N T T"], options: Sequence[Span], *, sinks: int = 64, block: int = 64
) -> Float[Array, "N P"]:
    """The influence that each option hides in each head, a mean over examples.

    Those of the query heads of one key head are to be added up.
    """
    T = influence.shape[-1]

    def of(span):
        seen = masks.dense(visible(tokens(span, T, block), sinks), T, T)
        unseen = masks.dense(masks.Causal(), T, T) & ~seen
        return jnp.where(unseen, influence, 0).sum((2, 3)).mean(0)

    return jnp.stack([of(span) for span in options], -1)


def plan(
    losses: Float[np.ndarray, "L N P"],
    density: Float[np.ndarray, "L P"],
    budget: Float[np.ndarray, "L"],
    *,
    importance: Float[np.ndarray, "L"] | None = None,
) -> Int[np.ndarray, "N"]:
    """The option of each head with the least loss in all.

    Args:
      losses: what an option of a head costs at each length (see `hidden`).
      density: the size of an option at each length, as in `tokens(...) / length`.
      budget: the most that the mean density over heads may be at each length.
      importance: of the lengths; equal where None.

    Raises ValueError where no choice keeps the budget.
    """
    L, N, P = losses.shape
    importance = np.ones(L) if importance is None else importance
    one_each = optimize.LinearConstraint(np.kron(np.eye(N), np.ones(P)), 1, 1)
    cheap = optimize.LinearConstraint(np.tile(density, N) / N, -np.inf, budget + 1e-9)
    found = optimize.milp(
        np.tensordot(importance, losses, 1).reshape(-1),
        integrality=np.ones(N * P),
        bounds=optimize.Bounds(0, 1),
        constraints=[one_each, cheap],
        options=dict(mip_rel_gap=0.0),
    )
    if found.x is None:
        raise ValueError(f"{budget=} must allow the smallest options, {density.min(-1)}")
    return found.x.reshape(N, P).argmax(-1)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k[:, :, :2], v=v[:, :, :2])


def _oracle(q, k, v, *, spans, sinks=64, block=64):
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    lag = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    outputs = []
    for n in range(q.shape[2]):
        alpha, beta = spans[n // G]
        span = block
        while span < alpha + beta * T:
            span += block
        seen = (lag >= 0) & ((lag < span) | (jnp.arange(T) < sinks)[None])
        x = jnp.einsum("BTH,BSH->BTS", q[:, :, n], k[:, :, n // G]) / jnp.sqrt(q.shape[-1])
        w = jax.nn.softmax(jnp.where(seen[None], x, -jnp.inf))
        outputs.append(jnp.einsum("BTS,BSV->BTV", w, v[:, :, n // G]))
    return jnp.stack(outputs, 2)


_SMALL = dict(sinks=2, block=4)

SPEC = registry.Intervention(
    fn=moa_sparse_spans,
    papers=("moa-sparse-spans",),
    example=_example,
    oracle=_oracle,
    identity=dict(spans=((0, 1.0), (0, 1.0))),
    untouched=functools.partial(ops.dot_product_attention, mask=masks.Causal()),
    variants=(
        dict(spans=((0, 1.0), (3, 0.0))) | _SMALL,
        dict(spans=((5, 0.0), (2, 0.25))) | _SMALL,
    ),
)
