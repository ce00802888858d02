r"""HyperAttention: large weights are found by sorting hashes, the rest is estimated from a sample.

Paper: Han et al., "HyperAttention: Long-context Attention in Near-Linear Time", arXiv:2310.05869,
algorithms 1 to 4.

    rank(x) = place of (x . plane_1 > 0, ..., x . plane_R > 0) in a Gray code
    near_t  = keys in t's block, where queries and keys are sorted by rank and cut into blocks
    d_t     = sum_{s near} exp(x_ts) + (S / M) sum_{s sampled, not near} exp(x_ts)
    o_t     = the same sums with v_s, over d_t                      x_ts = q_t . k_s / sqrt(H)

Vectors of a small angle have hashes that are near in a Gray code, and large products. Sums over a
uniform sample of M keys are right on average. Where block is all keys this is attention.

With a causal mask, the second half of a sequence attends to the first in this way, and each half to
itself, by halves again, down to pieces of `min_length`, which attend exactly. All pieces of a size
are taken together. Memory is linear in T, cost too but for the sorting; a causal mask adds log T.

Shapes: B batch, T queries, S keys, N heads, K kv-heads, H head dim, V value dim, R planes,
M samples, C keys of a block, L blocks.
Unlike the paper: keys are sampled evenly and not by the size of their values, as in the authors'
code, and one draw serves all heads and pieces.

With a causal mask no query sees a later key. But the block of a query depends on all queries of its
piece, so this is not strictly causal, and can't be computed token by token.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnjax.core import layers, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops


def hyperattention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    planes: Float[Array, "H R"],
    samples: Float[Array, "M"],
    *,
    mask: masks.Mask | None = None,
    block: int = 256,
    min_length: int = 4096,
) -> Float[Array, "B T N V"]:
    """o in v's dtype. Sorting and sampling have no gradient.

    Args:
      planes: normals of the planes that hash; directions alone count.
      samples: even random numbers in [0, 1), which say where in a sequence keys are sampled.
      mask: honours Causal; NotImplementedError for others.
      block: C.
      min_length: up to which a causal piece attends exactly.

    Raises ValueError for a block or min_length below 1, and for T != S with a causal mask.
    """
    if block < 1 or min_length < 1:
        raise ValueError(f"{block=} and {min_length=} must be at least 1")
    (causal,) = masks.select(mask, masks.Causal, by="hyperattention")
    estimate = functools.partial(_estimate, planes=planes, samples=samples, block=block)
    values = v.astype(jnp.float32)
    if not causal:
        return estimate(q, k, values)[0].astype(v.dtype)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"T={q.shape[1]} must be S={k.shape[1]} with a causal mask")
    return _causal(estimate, q, k, values, min_length).astype(v.dtype)


def _causal(estimate, q, k, v, min_length):
    """o by halves: `estimate` below the diagonal, attention in the pieces on it."""
    B, T = q.shape[:2]
    depth = max(0, (-(-T // min_length) - 1).bit_length())
    piece = -(-T // 2**depth)
    q, k, v = (_pad(x, piece * 2**depth) for x in (q, k, v))  # the end is seen by nobody before
    cut = lambda x, size: x.reshape(-1, size, *x.shape[2:])
    join = lambda x: x.reshape(B, -1, *x.shape[2:])
    exact = functools.partial(ops.dot_product_attention, mask=masks.Causal(), return_lse=True)
    total = [join(x) for x in exact(*(cut(x, piece) for x in (q, k, v)))]
    for level in range(depth):
        halves = [cut(x, piece * 2 ** (level + 1)) for x in (q, k, v)]
        size = piece * 2**level
        o, lse = estimate(halves[0][:, size:], *(x[:, :size] for x in halves[1:]))
        before = [jnp.zeros_like(o), jnp.full_like(lse, -jnp.inf)]
        below = [join(jnp.concatenate(x, 1)) for x in zip(before, (o, lse), strict=True)]
        total = _merge(total, below)
    return total[0][:, :T]


def _estimate(q, k, v, *, planes, samples, block):
    """(o, lse) of queries for all keys: exact in the block of a query, sampled beyond."""
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    L = -(-S // block)
    size = -(-T // L)
    order, places = _sort(q, planes)
    keys, key_places = _sort(k, planes)
    cut = lambda x, order, size: _pad(_take(x, order), L * size).reshape(B, L, size, *x.shape[2:])
    real = (jnp.arange(L * block) < S).reshape(L, 1, block)
    attend = functools.partial(ops.dot_product_attention, return_lse=True)
    near = jax.vmap(lambda q, k, v, real: attend(q, k, v, mask=masks.Valid(real)), (1, 1, 1, 0), 1)
    near = near(cut(q, order, size), cut(k, keys, block), cut(v, keys, block), real)
    near = [_take(x.reshape(B, L * size, *x.shape[3:]), places) for x in near]
    if L == 1:
        return near
    M = len(samples)
    at = jnp.minimum((jax.lax.stop_gradient(samples) * S).astype(jnp.int32), S - 1)
    own = jnp.repeat(key_places[:, at] // block, N // K, 2)[:, None]
    far = masks.Dense(jnp.moveaxis(own != (places // size)[:, :, None], 3, 1))
    o, lse = attend(q, k[:, at], v[:, at], mask=far)
    return _merge(near, (o, lse + jnp.log(S / M)))


def _merge(a, b):
    """(o, lse) of attention to the keys of two pieces, each given by its own."""
    o, lse = (jnp.stack(x, -1) for x in zip(a, b, strict=True))
    share = jax.nn.softmax(jnp.maximum(lse, -1e30), -1)  # all may be -inf, which gives NaN
    return jnp.einsum("BTNVA,BTNA->BTNV", o, share), jax.nn.logsumexp(lse, -1)


def lsh_rank(x: Float[Array, "B T N H"], planes: Float[Array, "H R"]) -> Int[Array, "B T N"]:
    """rank(x), 0 to 2^R - 1: neighbours lie on the same side of all planes but one."""
    side = jnp.einsum("BTNH,HR->BTNR", x.astype(jnp.float32), planes) > 0
    digits = jnp.cumsum(side, -1) % 2
    return (digits << jnp.arange(planes.shape[1])[::-1][None, None, None]).sum(-1)


def _sort(x, planes):
    """The tokens by rank (B T N), and the place of each token in that order (B T N)."""
    order = jnp.argsort(lsh_rank(jax.lax.stop_gradient(x), planes), 1)
    return order, jnp.argsort(order, 1)


def _take(x, order):
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 3)), 1)


def _pad(x, length):
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])


def draw(
    seed: int, H: int, num_planes: int, num_samples: int
) -> tuple[Float[Array, "H R"], Float[Array, "M"]]:
    """Planes and samples, the same for the same seed."""
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], (H, num_planes)), jax.random.uniform(keys[1], (num_samples,))


class HyperAttention(nn.Module):
    """HyperAttention over (B T D). Planes and samples are constants, by `seed`."""

    num_heads: int
    head_dim: int
    block: int = 256
    min_length: int = 4096
    num_planes: int = 7
    num_samples: int = 256
    seed: int = 0
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = hyperattention

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` may be Causal."""
        heads = functools.partial(layers.HeadProjection, self.num_heads, self.head_dim, self.dtype)
        q, k, v = (heads(name=name)(x) for name in ("query", "key", "value"))
        given = draw(self.seed, self.head_dim, self.num_planes, self.num_samples)
        options = dict(mask=mask, block=self.block, min_length=self.min_length)
        o = layers.Attend(self.fn, name="attend")(q, k, v, *given, **options)
        return layers.OutputProjection(self.dtype, name="out")(o, x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    planes = jax.random.normal(jax.random.fold_in(key, 1), (8, 4))
    samples = jax.random.uniform(jax.random.fold_in(key, 2), (16,))
    return dict(q=q, k=k[:, :, :2], v=v[:, :, :2], planes=planes, samples=samples)


def _oracle(q, k, v, planes, samples, *, block=256, min_length=4096, mask=None):
    """Every pair has the number of times that it counts: an estimate is a weighted softmax."""
    T, R, G = q.shape[1], planes.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, G, 2) for x in (k, v))
    gray = jnp.argsort(jnp.array([i ^ (i >> 1) for i in range(2**R)]))  # code -> place
    place = lambda x: jnp.argsort(
        jnp.argsort(gray[((x @ planes > 0) @ 2 ** jnp.arange(R)[::-1])], 1), 1
    )

    def times(q, k):
        S = k.shape[1]
        size = -(-q.shape[1] // -(-S // block))
        near = (place(q) // size)[:, :, None] == (place(k) // block)[:, None]
        drawn = (jnp.floor(samples * S)[:, None] == jnp.arange(S)[None]).sum(0) * S / len(samples)
        return jnp.where(near, 1.0, drawn[None, None, :, None])

    def causal(q, k, depth):
        T = q.shape[1]
        if depth == 0:
            return jnp.tril(jnp.ones((T, T)))[None, :, :, None] * jnp.ones_like(times(q, k))
        (q, r), (k, u) = jnp.split(q, 2, 1), jnp.split(k, 2, 1)
        rows = [causal(q, k, depth - 1), 0 * times(q, u)], [times(r, k), causal(r, u, depth - 1)]
        return jnp.concatenate([jnp.concatenate(row, 2) for row in rows], 1)

    if mask is None:
        count = times(q, k)
    else:
        depth = next(d for d in range(99) if -(-T // 2**d) <= min_length)
        pad = lambda x: jnp.pad(x, ((0, 0), (0, -T % 2**depth), (0, 0), (0, 0)))
        count = causal(pad(q), pad(k), depth)[:, :T, :T]
    x = jnp.einsum("BTNH,BSNH->BTSN", q, k) / jnp.sqrt(q.shape[-1])
    w = jax.nn.softmax(x + jnp.log(jnp.maximum(count, 1e-30)), 2)
    return jnp.einsum("BTSN,BSNV->BTNV", w, v)


SPEC = registry.Mechanism(
    fn=hyperattention,
    module=HyperAttention,
    small=dict(num_heads=4, head_dim=8, block=3, num_planes=3, num_samples=3),
    papers=("hyperattention",),
    example=_example,
    oracle=_oracle,
    variants=(
        dict(block=16),
        dict(block=10, min_length=20, mask=masks.Causal()),
    ),
    claims=frozenset(
        {Claim.DENSE_TWIN, Claim.LINEAR_MEMORY, Claim.FORWARD_MODE, Claim.CONTEXT_PARALLEL}
    ),
    context=("all_to_all",),
)
