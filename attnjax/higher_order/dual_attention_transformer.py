r"""Dual attention: some heads bring values, others how the query and each token relate.

Paper: Altabaa and Lafferty, "Disentangling and Integrating Relational and Sensory Information in
Transformer Architectures", arXiv:2405.16727, section 2.

    a_ts  = softmax_s(q_t . k_s / sqrt(H))                         for each head
    r_tsr = rq_tr . rk_sr / sqrt(P)                                relations, shared by all heads
    o_t   = sum_s a_ts v_s                                         a sensory head
    o_t   = sum_s a_ts (sum_r r_tsr w_r + v_s)                     a relational head

A relational head's v_s is a symbol: it says which token is meant and not what is in it. Here it
comes from a library, v_s = sum_m softmax_m(p_s . f_m / sqrt(H)) l_m, by heads, and is projected.
Relations are linear in rk, so sum_s a_ts r_tsr = rq_tr . (sum_s a_ts rk_sr): they need softmax
attention with the rk as further values, and no array of pairs.

Shapes: B batch, T queries, S keys, N heads of which the last A are relational, H head dim, V value
dim, R relations of P features, M symbols, D model dim.
Unlike the paper: relations are divided by sqrt(P), as in the authors' code; the module has
symbolic attention alone (the function takes symbols of any kind that belong to a token, not those
of relative positions); positions are a rotation of q and k (`rotary_base`) or left to the model.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnjax.core import decode, layers, masks, positions, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops


def dual_attention_transformer(
    q: Float[Array, "B T heads H"],  # not N: no device can have a part, as the last A are others
    k: Float[Array, "B S heads H"],
    v: Float[Array, "B S heads V"],
    rq: Float[Array, "B T R P"],
    rk: Float[Array, "B S R P"],
    w: Float[Array, "A R V"],
    *,
    mask: masks.Mask | None = None,
    q_offset: int | Int[Array, ""] = 0,
) -> Float[Array, "B T heads V"]:
    """o in v's dtype.

    Args:
      v: values of the sensory heads and, for the last A, symbols.
      rq, rk: features that are compared, of queries and of keys.
      w: what each relation adds to a relational head.
      mask: any that is the same for all heads; a query that sees nothing gives zeros.
      q_offset: position of the first query.

    Raises ValueError where A is not 1 to N - 1 or the mask differs between heads.
    """
    (B, S, N, V), (A, R, _), P = v.shape, w.shape, rq.shape[-1]
    if not 1 <= A < N:
        raise ValueError(f"w {w.shape} must be for 1 to {N - 1} of the {N=} heads")
    if (heads := masks.dense(mask, 1, 1).shape[1]) != 1:
        raise ValueError(f"mask for {heads} heads must be for 1")
    attend = functools.partial(ops.dot_product_attention, mask=mask, q_offset=q_offset)
    sensory, relational = ([x[:, :, part] for x in (q, k, v)] for part in _parts(N - A))
    features = jnp.broadcast_to(rk.reshape(B, S, 1, R * P), (B, S, A, R * P))
    *pair, symbols = relational
    o = attend(*pair, jnp.concatenate([symbols, features], -1).astype(jnp.float32))
    symbols, features = o[..., :V], o[..., V:].reshape(*o.shape[:-1], R, P)
    r = jnp.einsum("BTRP,BTARP->BTAR", rq.astype(jnp.float32), features) * P**-0.5
    o = symbols + jnp.einsum("BTAR,ARV->BTAV", r, w.astype(jnp.float32))
    return jnp.concatenate([attend(*sensory), o.astype(v.dtype)], 2)


def _parts(count):
    return slice(None, count), slice(count, None)


def symbolic_attention(
    p: Float[Array, "B S N H"],
    templates: Float[Array, "M N H"],
    library: Float[Array, "M N V"],
) -> Float[Array, "B S N V"]:
    """For each token and head a mean of symbols, by how well the token fits each one's template.

    In p's dtype.
    """
    exact = lambda x: x.astype(jnp.float32)
    x = jnp.einsum("BSNH,MNH->BSNM", exact(p), exact(templates)) * p.shape[-1] ** -0.5
    return jnp.einsum("BSNM,MNV->BSNV", jax.nn.softmax(x), exact(library)).astype(p.dtype)


class SymbolicAttention(nn.Module):
    """Symbols (B S N H) for tokens (B S D) from a learned library of `num_symbols`."""

    num_heads: int
    head_dim: int
    num_symbols: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S N H"]:
        N, H = self.num_heads, self.head_dim
        init = nn.initializers.normal(1.0)
        table = lambda name: layers.Table((self.num_symbols, N, H), init, name=name)()
        p = layers.HeadProjection(N, H, self.dtype, name="query")(x)
        return symbolic_attention(p, table("templates"), table("library"))


class DualAttentionTransformer(nn.Module):
    """Dual attention over (B T D): num_relational_heads of num_heads are relational.

    num_relational_heads None is half of the heads, num_relations None as many relations as
    relational heads, relation_dim None is head_dim. symmetric compares queries and keys by the same
    features. rotary_base None is no rotation. Streaming is causal.
    """

    num_heads: int
    head_dim: int
    num_relational_heads: int | None = None
    num_relations: int | None = None
    relation_dim: int | None = None
    num_symbols: int = 64
    symmetric: bool = False
    rotary_base: float | None = None
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = dual_attention_transformer

    def setup(self):
        N, H, dtype = self.num_heads, self.head_dim, self.dtype
        A, R, P = self._sizes()
        if not 1 <= A < N:
            raise ValueError(f"num_relational_heads={A} must be 1 to {N - 1}: num_heads={N}")
        self.query = layers.HeadProjection(N, H, dtype)
        self.key = layers.HeadProjection(N, H, dtype)
        self.value = layers.HeadProjection(N - A, H, dtype)
        self.symbols = SymbolicAttention(A, H, self.num_symbols, dtype)
        self.symbol_value = layers.HeadProjection(A, H, dtype)
        self.relation_query = layers.HeadProjection(R, P, dtype)
        if not self.symmetric:
            self.relation_key = layers.HeadProjection(R, P, dtype)
        self.relation_value = layers.Table((A, R, H), nn.initializers.normal(R**-0.5))
        self.attend = layers.Attend(self.fn)
        self.out = layers.OutputProjection(dtype)

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says what each token sees."""
        q, k, v, rq, rk = self._project(x, jnp.arange(x.shape[1]))
        o = self.attend(q, k, v, rq, rk, self.relation_value(), mask=mask)
        return self.out(o, x.shape[-1])

    def init_state(self, batch: int, length: int) -> tuple[decode.KVCache, decode.KVCache]:
        """Empty caches for `length` tokens: keys and values, and features of relations."""
        N, H, (_, R, P) = self.num_heads, self.head_dim, self._sizes()
        empty = functools.partial(decode.KVCache.empty, batch, length)
        dtype = self.dtype or jnp.float32
        return empty(N, H, H, dtype), empty(R, P, 0, dtype)

    def extend(
        self, state: tuple[decode.KVCache, decode.KVCache], x: Float[Array, "B T D"]
    ) -> tuple[tuple[decode.KVCache, decode.KVCache], Float[Array, "B T D"]]:
        """The next T tokens, each of which sees those before it and itself."""
        length = state[0].length
        q, k, v, rq, rk = self._project(x, length + jnp.arange(x.shape[1]))
        cache, features = state[0].append(k, v), state[1].append(rk, rk[..., :0])
        options = dict(mask=masks.Causal(), q_offset=length)
        o = self.attend(q, cache.k, cache.v, rq, features.k, self.relation_value(), **options)
        return (cache, features), self.out(o, x.shape[-1])

    def _sizes(self):
        """A, R and P."""
        A = self.num_heads // 2 if self.num_relational_heads is None else self.num_relational_heads
        return A, self.num_relations or A, self.relation_dim or self.head_dim

    def _project(self, x, at):
        q, k = self.query(x), self.key(x)
        if self.rotary_base is not None:
            q = positions.rotary(q, at, base=self.rotary_base)
            k = positions.rotary(k, at, base=self.rotary_base)
        symbols = self.symbols(x)
        symbols = self.symbol_value(symbols.reshape(*symbols.shape[:2], -1))
        v = jnp.concatenate([self.value(x), symbols], 2)
        rq = self.relation_query(x)
        return q, k, v, rq, rq if self.symmetric else self.relation_key(x)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
    heads = dict(q=draw(0, 2, T, 4, 8), k=draw(1, 2, T, 4, 8), v=draw(2, 2, T, 4, 5))
    return heads | dict(rq=draw(3, 2, T, 3, 6), rk=draw(4, 2, T, 3, 6), w=draw(5, 2, 3, 5))


def _oracle(q, k, v, rq, rk, w, *, mask=None):
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    a = jax.nn.softmax(jnp.where(masks.dense(mask, q.shape[1], k.shape[1]), x, -1e30))
    r = jnp.einsum("BTRP,BSRP->BTSR", rq, rk) / jnp.sqrt(rq.shape[-1])
    heads = []
    for n in range(q.shape[2]):
        message, i = v[:, None, :, n], n - (q.shape[2] - len(w))
        if i >= 0:
            message = message + jnp.einsum("BTSR,RV->BTSV", r, w[i])
        message = jnp.broadcast_to(message, (*a[:, n].shape, v.shape[-1]))
        heads.append(jnp.einsum("BTS,BTSV->BTV", a[:, n], message))
    return jnp.stack(heads, 2)


SPEC = registry.Mechanism(
    fn=dual_attention_transformer,
    module=DualAttentionTransformer,
    small=dict(num_heads=4, head_dim=8, num_symbols=5),
    papers=("dual-attention-transformer",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(mask=masks.Causal())),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.PERMUTATION_EQUIVARIANT,
            Claim.STREAMABLE,
            Claim.LINEAR_MEMORY,
            Claim.FORWARD_MODE,
            Claim.CONTEXT_PARALLEL,
        }
    ),
    context=("gather",),
)
