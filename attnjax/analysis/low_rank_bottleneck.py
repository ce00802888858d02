r"""The low-rank bottleneck: how many features a head needs to pay a given attention.

Paper: Bhojanapalli et al., "Low-Rank Bottleneck in Multi-head Attention Models",
arXiv:2002.07028, section 3, theorem 1, and the proposal of section 4.

A head of H features has logits Q K^T / sqrt(H) of rank at most H. For tokens of full rank, H >= S
features can give every positive matrix of weights, and H < S can't. Softmax doesn't see what is
added to a row, so more exactly, for weights P,

    C = log P - mean over keys of log P,        needed = rank C <= S - 1
    C_H: the nearest matrix to C of rank H = U_H diag(s_H) V_H^T
    kept       = |C_H|^2 / |C|^2
    divergence = mean over queries of KL(P || softmax(C_H))     that of the best is no larger

and H features can give P if and only if H >= needed. The paper's remedy is a head dim that doesn't
depend on the model dim and the number of heads. That is `head_dim` of every attention in this
library, so what the paper adds to them is this measurement.

Shapes: B any leading axes, T queries, S keys, H head dim.
Unlike the paper: S - 1 features are enough, for the reason above. It is made for weights without
a mask: a weight below 1e-30 counts as 1e-30.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from attnjax.core import registry

_LEAST = 1e-30
_ZERO = 1e-5  # of the largest singular value: what float32 weights leave of a zero


def low_rank_bottleneck(
    weights: Float[Array, "*B T S"], *, head_dim: int = 4
) -> dict[str, Num[Array, "*B"]]:
    """needed, kept and divergence of each map, for heads of `head_dim` features; no gradients."""
    weights = jax.lax.stop_gradient(weights)
    q, k = queries_and_keys(weights, head_dim)
    best = jax.nn.log_softmax(q @ k.mT * head_dim**-0.5)
    log = _log(weights)
    singular = jnp.linalg.svd(_centred(weights), compute_uv=False)
    energy = jnp.cumsum(singular**2, -1)
    total, most = energy[..., -1], singular[..., :1]
    part = energy[..., min(head_dim, singular.shape[-1]) - 1]
    return dict(
        needed=jnp.sum(singular > _ZERO * most, -1),
        kept=jnp.where(total > 0, part / jnp.where(total > 0, total, 1.0), 1.0),
        divergence=jnp.sum(jnp.exp(log) * (log - best), -1).mean(-1),
    )


def queries_and_keys(
    weights: Float[Array, "*B T S"], head_dim: int
) -> tuple[Float[Array, "*B T H"], Float[Array, "*B S H"]]:
    """Queries and keys with Q K^T / sqrt(H) = C_H, in float32.

    Their softmax is `weights` where H is at least what they need. Raises ValueError for H < 1.
    """
    if head_dim < 1:
        raise ValueError(f"{head_dim=} must be at least 1")
    u, s, vh = jnp.linalg.svd(_centred(weights), full_matrices=False)
    root = jnp.sqrt(s * head_dim**0.5)[..., None, :]
    extra = [(0, 0)] * (u.ndim - 1) + [(0, max(head_dim - s.shape[-1], 0))]
    return tuple(jnp.pad((x * root)[..., :head_dim], extra) for x in (u, vh.mT))


def _log(weights):
    return jnp.log(jnp.maximum(weights.astype(jnp.float32), _LEAST))


def _centred(weights):
    """C."""
    log = _log(weights)
    return log - log.mean(-1, keepdims=True)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    return dict(weights=jax.nn.softmax(2 * jax.random.normal(key, (2, 3, T, T))))


def _oracle(weights, *, head_dim=4):
    def one(P):
        C = jnp.log(P) @ (jnp.eye(len(P)) - 1 / len(P))
        _, vectors = jnp.linalg.eigh(C.T @ C)
        nearest = C @ vectors[:, -head_dim:] @ vectors[:, -head_dim:].T
        lost, total = jnp.sum((C - nearest) ** 2), jnp.sum(C**2)
        ratio = jnp.log(P) - jnp.log(jax.nn.softmax(nearest))
        return dict(
            needed=jnp.linalg.matrix_rank(C, rtol=1e-5),
            kept=jnp.where(total > 1e-12, 1 - lost / total, 1.0),
            divergence=jnp.mean(jnp.sum(P * ratio, 1)),
        )

    return jax.vmap(jax.vmap(one))(jax.lax.stop_gradient(weights))


SPEC = registry.Probe(
    fn=low_rank_bottleneck,
    papers=("fixed-head-size",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(head_dim=1), dict(head_dim=80)),
)
