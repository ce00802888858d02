r"""Sparsifiner: a cheap guess of the attention map says which few keys each query attends to.

Paper: Wei et al., "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision
Transformers", arXiv:2303.13755, section 3.

    c_t   = softmax_r((W_q q_t) . sum_s down_sr (W_k k_s) / sqrt(E))     what t wants of R patterns
    map_t = sum_r c_tr up_r                                              a guess of t's weights
    o_t   = attention of q_t to the topk keys s of highest map_ts

with c and the size of up cut to 0 where they don't exceed their thresholds. A pattern up_r is a
learned map over positions, so that the choice is by place and by content. It has no gradient:
W_q, W_k, down and up learn from `reconstruction_loss` alone, the squared distance of the map
(without thresholds) and the weights of full attention. Attention costs topk keys a query.

Shapes: B batch, T queries, S keys, N heads, H head dim, V value dim, E gate dim, R patterns,
A = topk keys of a query.
Unlike the paper: scores of the guess are divided by the root of E; a class token is treated as any
other, where the paper lets it see all; keys that a mask hides are in no sum of `down`; the paper
first trains with the reconstruction loss and full attention, and then without either.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import layers, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import auxiliary_loss


def sparsifiner(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N V"],
    gate_q: Float[Array, "H E"],
    gate_k: Float[Array, "H E"],
    down: Float[Array, "S R"],
    up: Float[Array, "R S"],
    *,
    mask: masks.Mask | None = None,
    topk: int = 49,
    threshold: float = 0.0,
    pattern_threshold: float = 0.0,
    reconstruct: float = 0.0,
) -> Float[Array, "B T N V"]:
    """o in v's dtype.

    Args:
      gate_q, gate_k: W_q and W_k, the same for all heads.
      mask: honours Valid; NotImplementedError for others.
      topk: A; more than S is all. Of equal keys the first is taken.
      threshold: of c.
      pattern_threshold: of up.
      reconstruct: weight of `reconstruction_loss`, which is added to any gradient; 0 is none.

    Raises ValueError for a topk below 1.
    """
    if topk < 1:
        raise ValueError(f"{topk=} must be at least 1")
    seen = _seen(mask, k)
    cut = lambda x, least: jnp.where(x > least, x, 0.0)
    c = cut(_wanted(q, k, gate_q, gate_k, down, seen), threshold)
    guess = jnp.einsum("BTNR,RS->BTNS", c, cut(jnp.abs(up), pattern_threshold))
    guess = jax.lax.stop_gradient(jnp.where(seen[:, None, None], guess, -jnp.inf))
    chosen = jax.lax.top_k(guess, min(topk, k.shape[1]))[1]
    o = _attend(q, k, v, chosen, seen).astype(v.dtype)
    if not reconstruct:
        return o
    loss = reconstruction_loss(q, k, gate_q, gate_k, down, up, mask=mask)
    return auxiliary_loss.attach(o, reconstruct * loss)


def reconstruction_loss(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    gate_q: Float[Array, "H E"],
    gate_k: Float[Array, "H E"],
    down: Float[Array, "S R"],
    up: Float[Array, "R S"],
    *,
    mask: masks.Mask | None = None,
) -> Float[Array, ""]:
    """sum_s (map_ts - weight_ts)^2, a mean over queries and heads. q and k are constants to it.

    Entries that the mask hides count 0. O(T S) memory.
    """
    seen = _seen(mask, k)
    guess = jnp.einsum("BTNR,RS->BTNS", _wanted(q, k, gate_q, gate_k, down, seen), up)
    q, k = jax.lax.stop_gradient((q.astype(jnp.float32), k.astype(jnp.float32)))
    seen = seen[:, None, None]
    x = jnp.einsum("BTNH,BSNH->BTNS", q, k) / q.shape[-1] ** 0.5
    w = jax.nn.softmax(jnp.where(seen, x, -1e30))
    return jnp.where(seen, (guess - w) ** 2, 0.0).sum(-1).mean()


def _seen(mask, k):
    """Keys (B S) that the mask leaves to any query."""
    (valid,) = masks.select(mask, masks.Valid, by="sparsifiner")
    return functools.reduce(jnp.logical_and, (x.keys for x in valid), jnp.ones(k.shape[:2], bool))


def _wanted(q, k, gate_q, gate_k, down, seen):
    """c (B T N R), without its threshold."""
    q, k = jax.lax.stop_gradient((q.astype(jnp.float32), k.astype(jnp.float32)))
    k = jnp.where(seen[..., None, None], k, 0.0)
    patterns = jnp.einsum("BSNH,HE,SR->BRNE", k, gate_k, down)
    x = jnp.einsum("BTNH,HE,BRNE->BTNR", q, gate_q, patterns)
    return jax.nn.softmax(x / gate_q.shape[-1] ** 0.5)


def _attend(q, k, v, chosen, seen):
    """Attention of each query and head to its keys chosen (B T N A), as far as they are seen."""
    B, _, N, _ = chosen.shape
    b, n = jnp.arange(B)[:, None, None, None], jnp.arange(N)[None, None, :, None]
    q, k, v = q.astype(jnp.float32), k[b, chosen, n], v[b, chosen, n].astype(jnp.float32)
    x = jnp.einsum("BTNH,BTNAH->BTNA", q, k.astype(jnp.float32)) * q.shape[-1] ** -0.5
    seen = seen[b, chosen]
    w = jnp.where(seen, jax.nn.softmax(jnp.where(seen, x, -1e30)), 0.0)
    return jnp.einsum("BTNA,BTNAV->BTNV", w, v)


class Sparsifiner(nn.Module):
    """Section 3 over (B T D), of up to `length` tokens.

    The guess learns along with whatever is trained, by `reconstruct` times its own loss.
    """

    num_heads: int
    head_dim: int
    length: int = 197
    topk: int = 49
    patterns: int = 24
    gate_dim: int = 32
    threshold: float = 0.0
    pattern_threshold: float = 0.0
    reconstruct: float = 1.0
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = sparsifiner

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says which tokens are Valid."""
        (T, D), H, E = x.shape[1:], self.head_dim, self.gate_dim
        if self.length < T:
            raise ValueError(f"{T=} must be at most length={self.length}")
        heads = functools.partial(layers.HeadProjection, self.num_heads, H, self.dtype)
        q, k, v = (heads(name=name)(x) for name in ("query", "key", "value"))
        init = nn.initializers.lecun_normal()
        gates = (layers.Table((H, E), init, name=f"gate_{name}")() for name in ("query", "key"))
        down = layers.Table((self.length, self.patterns), name="down")()[:T]
        up = layers.Table((self.patterns, self.length), name="up")()[:, :T]
        options = dict(threshold=self.threshold, pattern_threshold=self.pattern_threshold)
        options |= dict(topk=self.topk, reconstruct=self.reconstruct)
        o = layers.Attend(self.fn, name="attend")(q, k, v, *gates, down, up, mask=mask, **options)
        return layers.OutputProjection(self.dtype, name="out")(o, D)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 3, 8))
    gate_q, gate_k = jax.random.normal(jax.random.fold_in(key, 1), (2, 8, 4))
    down = jax.random.normal(jax.random.fold_in(key, 2), (T, 5)) / T**0.5
    up = jax.random.normal(jax.random.fold_in(key, 3), (5, T))
    return dict(q=q, k=k, v=v, gate_q=gate_q, gate_k=gate_k, down=down, up=up)


def _oracle(q, k, v, gate_q, gate_k, down, up, *, topk=49, threshold=0.0, pattern_threshold=0.0):
    wide = lambda x: jax.lax.stop_gradient(x.astype(jnp.float32))
    patterns = jnp.swapaxes(wide(k) @ wide(gate_k), 1, 3) @ wide(down)  # B E N R
    x = jnp.einsum("BTNE,BENR->BTNR", wide(q) @ wide(gate_q), patterns)
    c = jax.nn.softmax(x / jnp.sqrt(gate_q.shape[-1]))
    size = jnp.abs(wide(up))
    guess = (c * (c > threshold)) @ (size * (size > pattern_threshold))
    first = jnp.arange(k.shape[1])
    better = (guess[..., None, :] > guess[..., :, None]) | (
        (guess[..., None, :] == guess[..., :, None])
        & (first[None] < first[:, None])[None, None, None]
    )
    seen = (better.sum(-1) < topk).swapaxes(1, 2)
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    return jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(jnp.where(seen, x, -1e30)), v)


SPEC = registry.Mechanism(
    fn=sparsifiner,
    module=Sparsifiner,
    small=dict(num_heads=4, head_dim=8, length=64, topk=3, patterns=2, gate_dim=4),
    papers=("sparsifiner",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(topk=7, threshold=0.2, pattern_threshold=0.6)),
    claims=frozenset({Claim.MASKABLE, Claim.DENSE_TWIN}),
)
