r"""LongHeads: each query reads as many chunks as fit the trained length, as if nothing lay between.

Paper: Lu et al., "LongHeads: Multi-Head Attention is Secretly a Long Context Processor",
arXiv:2402.10685, section 2, and the authors' code.

    u_j   = mean over chunk j of softmax(rot(Q_j) rot(K_j)^T / sqrt(H)) V_j       inside the chunk
    c_j   = softmax(u_j rot(K_j)^T / sqrt(H)) rot(K_j)              its representation, by head
    a query of chunk i reads chunk 0, i - 1 and i, and those below with the largest q_t . c_j,
    A = window / C in all;   rot turns by the position within a chunk, q_t is not turned
    the A chunks in their order get the positions 0, 1, ... window - 1, by which q and k are rotated
    o_t   = attention of q_t to the keys of these chunks up to t

So no position is larger than the model was trained for, and each head may look at other places.
Attention costs `window` keys a query, the choice one product for each chunk; memory is linear in T.
It needs no training: set it as `fn` of a MultiHeadAttention that doesn't rotate by itself
(rotary_base=None), with the base here. window >= T is rotary attention.

What stands for a chunk depends on its queries, but no head knows of another: over devices it runs
by `all_to_all` or `tensor`, as the function of a record of softmax attention:

    attend = dataclasses.replace(
        registry.get("multi_head_attention"), fn=longheads, context=("all_to_all",)
    )
    module.clone(fn=functools.partial(parallel.shard(None, attend, mesh), window=..., chunk=...))

Shapes: B batch, T queries, S keys, N heads, K kv-heads, G = N/K, H head dim, V value dim, C tokens
of a chunk, L chunks, A chunks that are read.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attnjax.core import masks, positions, registry
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import selected_block_attention as blocks


def longheads(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: masks.Mask | None = None,
    window: int = 4096,
    chunk: int = 256,
    base: float = 10_000.0,
    summaries: Float[Array, "B L N H"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
) -> Float[Array, "B T N H"]:
    """o in v's dtype; q and k are not rotated yet. Always causal.

    Args:
      mask: honours Causal, which holds anyway; NotImplementedError for others.
      window: the trained length, a multiple of chunk and at least 3 of them.
      base: of the rotation.
      summaries: c of each finished chunk, where they are known already (`summarise`): a cache of
        keys and values can't give them, since they depend on queries.
      q_offset: position of the first query; keys begin at 0.

    Raises ValueError for a window that doesn't fit, and where summaries are needed.
    """
    masks.select(mask, masks.Causal, by="longheads")
    if chunk < 1 or window % chunk or window < 3 * chunk:
        raise ValueError(f"{window=} must be a multiple of {chunk=} and at least 3 of them")
    (T, S), begins = (q.shape[1], k.shape[1]), isinstance(q_offset, int) and q_offset == 0
    if begins and max(T, S) <= window:
        q, k = (positions.rotary(x, jnp.arange(x.shape[1]), base=base) for x in (q, k))
        return ops.dot_product_attention(q, k, v, mask=masks.Causal())
    if summaries is None:
        if not begins or T != S:
            raise ValueError("summaries must be given for queries that follow a cache")
        summaries = summarise(q, k, v, chunk=chunk, base=base)
    keys = positions.rotary(k, jnp.arange(S) % chunk, base=base)
    keys, values = blocks.cut(keys, chunk), blocks.cut(v, chunk)
    count = min(window // chunk, keys.shape[1])
    fixed = lax.stop_gradient(summaries)

    @jax.checkpoint
    def one(x):
        q, t = x
        chosen = choose(lax.stop_gradient(q), fixed, t // chunk, count)
        turns = (jnp.minimum(t // chunk, count - 1) - jnp.arange(count)) * chunk + t % chunk
        turned = positions.rotary(jnp.repeat(q[:, None], count, 1), turns, base=base)
        return _attend(turned, keys, values, chosen, t)

    o = lax.map(one, (q.swapaxes(0, 1), q_offset + jnp.arange(T)))
    return o.swapaxes(0, 1).astype(v.dtype)


def summarise(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    chunk: int = 256,
    base: float = 10_000.0,
) -> Float[Array, "B L N H"]:
    """c of each chunk. That of a last one which is not full means nothing, and nobody reads it."""
    q, k = (positions.rotary(x, jnp.arange(x.shape[1]) % chunk, base=base) for x in (q, k))
    q, k, v = (blocks.cut(x, chunk) for x in (q, k, v))
    attend = jax.vmap(ops.dot_product_attention, 1, 1)
    u = attend(q, k, v).mean(2, keepdims=True)
    return attend(u, k, k)[:, :, 0]


def choose(
    q: Float[Array, "B N H"],
    summaries: Float[Array, "B L N H"],
    here: Int[Array, ""],
    count: int,
) -> Int[Array, "B N A"]:
    """The chunks that a query of chunk `here` reads, in order; later ones where there are few."""
    dtype = jnp.float32
    score = jnp.einsum("BNH,BLNH->BNL", q.astype(dtype), summaries.astype(dtype))
    j = jnp.arange(score.shape[-1])[None, None]
    stays = (j == 0) | (j == here) | (j == here - 1)
    score = jnp.where(stays, jnp.inf, jnp.where(j < here, score, -jnp.inf))
    return jnp.sort(lax.top_k(score, count)[1])


def _attend(q, keys, values, chosen, t):
    """A query, turned for each of its chunks (B A N H), attends to their keys up to t."""
    (B, _, N, H), (C, K) = q.shape, keys.shape[2:4]
    b, n = jnp.arange(B)[:, None, None], jnp.arange(N)[None, :, None] // (N // K)
    keys, values = (x[b, chosen, :, n].astype(jnp.float32) for x in (keys, values))  # (B N A C H)
    x = jnp.einsum("BANH,BNACH->BNAC", q.astype(jnp.float32), keys) * H**-0.5
    seen = chosen[..., None] * C + jnp.arange(C)[None, None, None] <= t
    w = jax.nn.softmax(jnp.where(seen, x, -1e30), (-2, -1))
    return jnp.einsum("BNAC,BNACH->BNH", w, values)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k[:, :, :2], v=v[:, :, :2])


def _rotary_attention(q, k, v):
    q, k = (positions.rotary(x, jnp.arange(x.shape[1])) for x in (q, k))
    return ops.dot_product_attention(q, k, v, mask=masks.Causal())


def _oracle(q, k, v, *, window=4096, chunk=256, base=10_000.0):
    """Every key has a position of its own for every query; vectors are turned as complex ones."""
    T, N, H = q.shape[1:]
    k, v = (jnp.repeat(x, N // k.shape[2], 2) for x in (k, v))
    speed = base ** -(2 * jnp.arange(H // 2) / H)
    join = lambda x: x[..., : H // 2] + 1j * x[..., H // 2 :]

    def score(q, k, lag):  # (T H), (S H), (T S)
        turned = jnp.exp(1j * lag[..., None] * speed[None, None])
        return (join(q)[:, None] * jnp.conj(join(k))[None] * turned).real.sum(-1) / jnp.sqrt(H)

    def head(q, k, v):
        place, number, L = jnp.arange(T) % chunk, jnp.arange(T) // chunk, -(-T // chunk)
        member = jnp.arange(L)[:, None] == number[None]
        own = jnp.where(number[:, None] == number[None], 0, -1e30)
        w = jax.nn.softmax(score(q, k, place[:, None] - place[None]) + own)
        u = member @ (w @ v) / member.sum(1, keepdims=True)
        turned = join(k) * jnp.exp(1j * place[:, None] * speed[None])
        k_local = jnp.concatenate([turned.real, turned.imag], -1)
        c = jax.nn.softmax(jnp.where(member, u @ k_local.T / jnp.sqrt(H), -1e30)) @ k_local
        below = number[:, None] - jnp.arange(L)[None]
        always = (below == 0) | (below == 1) | (jnp.arange(L) == 0)[None]
        like = jnp.where(always, 1e30, jnp.where(below > 0, q @ c.T, -1e30))
        larger = (like[:, None] > like[:, :, None]).sum(-1)
        reads = (larger < window // chunk) & (below >= 0)
        at = (jnp.cumsum(reads, 1) - 1)[:, number] * chunk + place[None]
        x = score(q, k, jnp.diag(at)[:, None] - at)
        seen = reads[:, number] & (jnp.arange(T)[None] <= jnp.arange(T)[:, None])
        return jax.nn.softmax(jnp.where(seen, x, -1e30)) @ v

    return jax.vmap(jax.vmap(head, 1, 1))(q, k, v)


SPEC = registry.Intervention(
    fn=longheads,
    papers=("longheads",),
    example=_example,
    oracle=_oracle,
    identity=dict(window=4096),
    untouched=_rotary_attention,
    variants=(dict(window=20, chunk=5, base=50.0), dict(window=9, chunk=3)),
)
