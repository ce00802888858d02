r"""Tensor attention: a query attends to pairs of keys, so that it can find what takes three tokens.

Paper: Alman and Song, "How to Capture Higher-order Correlations? Generalizing Matrix Softmax
Attention to Kronecker Computation", arXiv:2310.04064, section 1.

    x_tjl = sum_h q_th k1_jh k2_lh / H,     o_t = sum_jl softmax_jl(x_tjl) (v1_j * v2_l)

Exact: for one query, the rows q_t * k1_j are queries of softmax attention to k2. It gives o_tj and
the log of the sum of its weights, lse_tj, and

    o_t = sum_j softmax_j(lse_tj) (v1_j * o_tj)

takes O(S^2) time for a query and O(S) memory. Fast: with the polynomial P of exp's Taylor series,

    P(x_tjl) = sum_r (c_r q_t^r) k1_j^r k2_l^r,    x^r a monomial of at most that degree, R of them,
    o_t      = sum_r c_r q_t^r (sum_j k1_j^r v1_j) * (sum_l k2_l^r v2_l), divided by the same of 1

takes O(T R) time (causal: O(T R V) memory), and is close where q, k1 and k2 have small entries.

Shapes: B batch, T queries, S keys, N heads, H head dim, V value dim, D model dim,
R = binomial(H + degree, degree).
Unlike the paper: heads and masks (j and l are both keys that t may see); P is Taylor's polynomial
and not the one of least degree for an error; no more than two keys.
"""

import functools
import itertools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnjax.core import decode, layers, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import state_masks


def tensor_attention(
    q: Float[Array, "B T N H"],
    k1: Float[Array, "B S N H"],
    k2: Float[Array, "B S N H"],
    v1: Float[Array, "B S N V"],
    v2: Float[Array, "B S N V"],
    *,
    mask: masks.Mask | None = None,
    degree: int | None = None,
    q_offset: int | Int[Array, ""] = 0,
) -> Float[Array, "B T N V"]:
    """o in v1's dtype, computed in float32.

    Args:
      mask: what a query may see as the one key and as the other; a query that sees nothing gives
        zeros. With `degree`: Causal and Valid.
      degree: of the polynomial in the place of exp, an even number, so that it is positive.
        None is the exact form.
      q_offset: position of the first query.

    Raises ValueError for a degree that is odd or negative, and NotImplementedError for a mask that
    can't be honoured.
    """
    if degree is not None and (degree < 0 or degree % 2):
        raise ValueError(f"{degree=} must be even and at least 0")
    exact = (x.astype(jnp.float32) for x in (q, k1, k2, v1, v2))
    options = dict(mask=mask, t=q_offset + jnp.arange(q.shape[1]))
    o = _softmax(*exact, **options) if degree is None else _taylor(*exact, degree, **options)
    return o.astype(v1.dtype)


def _softmax(q, k1, k2, v1, v2, *, mask, t):
    S, H = k1.shape[1], q.shape[-1]

    def one(x):
        query, t = x  # B N H
        at = jnp.broadcast_to(t, S), np.arange(S)
        options = dict(mask=mask, positions=at, scale=1 / H, return_lse=True)
        o, lse = ops.dot_product_attention(query[:, None] * k1, k2, v2, **options)
        seen = masks.dense(mask, 1, S, q_offset=t)[:, :, 0]
        w = jax.nn.softmax(jnp.where(seen, lse.swapaxes(1, 2), 0.0), where=seen)
        return jnp.einsum("BNS,BSNV->BNV", w, v1 * o)

    return jax.lax.map(jax.checkpoint(one), (q.swapaxes(0, 1), t)).swapaxes(0, 1)


def _taylor(q, k1, k2, v1, v2, degree, *, mask, t):
    by = "tensor_attention with a degree"
    causal, valid = masks.select(mask, masks.Causal, masks.Valid, by=by)
    index, weight = _monomials(q.shape[-1], degree)
    one = lambda x: jnp.ones_like(x[..., :1])
    features = lambda x: jnp.concatenate([x, one(x)], -1)[..., index].prod(-1)

    def sums(k, v):
        """(B T N R V1), or with T = 1 for all queries: sums over what is seen; V1 = V + 1."""
        k, v = state_masks.only_valid(features(k), valid), jnp.concatenate([v, one(v)], -1)
        if not causal:
            return jnp.einsum("BSNR,BSNV->BNRV", k, v)[:, None]
        return jnp.cumsum(k[..., None] * v[..., None, :], 1)[:, t]

    weighted = (features(q) * weight[None, None, None])[..., None, :]
    o = (weighted @ (sums(k1, v1) * sums(k2, v2)))[..., 0, :]
    o, total = o[..., :-1], o[..., -1:]
    return jnp.where(total > 0, o / jnp.where(total > 0, total, 1.0), 0.0)


@functools.cache
def _monomials(H: int, degree: int) -> tuple[Int[np.ndarray, "R degree"], Float[np.ndarray, "R"]]:
    """Factors of each monomial, filled up by the index H of a one; and its weight.

    (sum_h x_h / H)^n / n! is the sum of the monomials of degree n, each over H^n and the factorials
    of its exponents.
    """
    sets = [
        factors
        for n in range(degree + 1)
        for factors in itertools.combinations_with_replacement(range(H), n)
    ]
    index = [factors + (H,) * (degree - len(factors)) for factors in sets]
    exponents = lambda factors: (factors.count(h) for h in set(factors))
    over = [H ** len(f) * math.prod(map(math.factorial, exponents(f))) for f in sets]
    return np.array(index, int), 1 / np.array(over, np.float32)


class TensorAttention(nn.Module):
    """Multi-head tensor attention over (B T D); `degree` as in `tensor_attention`.

    Streaming is causal.
    """

    num_heads: int
    head_dim: int
    degree: int | None = None
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = tensor_attention

    def setup(self):
        heads = lambda: layers.HeadProjection(self.num_heads, self.head_dim, self.dtype)
        self.query = heads()
        self.first_key, self.second_key = heads(), heads()
        self.first_value, self.second_value = heads(), heads()
        self.attend = layers.Attend(self.fn)
        self.out = layers.OutputProjection(self.dtype)

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to pairs of its tokens; `mask` says what each token sees."""
        keys, values = self._keys(x), self._values(x)
        o = self.attend(self.query(x), *keys, *values, mask=mask, degree=self.degree)
        return self.out(o, x.shape[-1])

    def init_state(self, batch: int, length: int) -> tuple[decode.KVCache, decode.KVCache]:
        """Empty caches for `length` tokens, of first and of second keys and values."""
        N, H = self.num_heads, self.head_dim
        empty = decode.KVCache.empty(batch, length, N, H, H, self.dtype or jnp.float32)
        return empty, empty

    def extend(
        self, state: tuple[decode.KVCache, decode.KVCache], x: Float[Array, "B T D"]
    ) -> tuple[tuple[decode.KVCache, decode.KVCache], Float[Array, "B T D"]]:
        """The next T tokens, each of which sees those before it and itself."""
        new = zip(state, self._keys(x), self._values(x), strict=True)
        first, second = (cache.append(k, v) for cache, k, v in new)
        options = dict(mask=masks.Causal(), degree=self.degree, q_offset=state[0].length)
        o = self.attend(self.query(x), first.k, second.k, first.v, second.v, **options)
        return (first, second), self.out(o, x.shape[-1])

    def _keys(self, x):
        return self.first_key(x), self.second_key(x)

    def _values(self, x):
        return self.first_value(x), self.second_value(x)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k1, k2, v1, v2 = jax.random.normal(key, (5, 2, T, 4, 4))
    return dict(q=q, k1=k1, k2=k2, v1=v1, v2=v2)


def _oracle(q, k1, k2, v1, v2, *, mask=None, degree=None):
    x = jnp.einsum("BTNH,BJNH,BLNH->BNTJL", q, k1, k2) / q.shape[-1]
    series = lambda x: sum(x**n / math.factorial(n) for n in range(degree + 1))
    w = jnp.exp(x) if degree is None else series(x)
    seen = masks.dense(mask, q.shape[1], k1.shape[1])
    w = jnp.where(seen[..., :, None] & seen[..., None, :], w, 0)
    w = w / w.sum((-1, -2), keepdims=True)
    return jnp.einsum("BNTJL,BJNV,BLNV->BTNV", w, v1, v2)


SPEC = registry.Mechanism(
    fn=tensor_attention,
    module=TensorAttention,
    small=dict(num_heads=4, head_dim=8),
    papers=("tensor-attention",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(mask=masks.Causal()), dict(degree=2, mask=masks.Causal())),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.CROSS,
            Claim.PERMUTATION_EQUIVARIANT,
            Claim.STREAMABLE,
            Claim.LINEAR_MEMORY,
            Claim.FORWARD_MODE,
            Claim.CONTEXT_PARALLEL,
        }
    ),
    context=("gather", "all_to_all"),
)
