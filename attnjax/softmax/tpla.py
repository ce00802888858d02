r"""Tensor parallel latent attention: a latent in slices, each with a softmax of its own.

Paper: Tang et al., "TPLA: Tensor Parallel Latent Attention for Efficient Disaggregated Prefill and
Decode Inference", arXiv:2508.15881, eqs. 6, 7, 17 and 22.

    c_s       = norm_j(x_s W_j),   r_s = rotary(x_s W_KR)              for each slice j; r is shared
    p_t,n,j   = q^C_t,n U_n,j^T / a_j
    o_t,n     = sum_j (sum_s softmax_s((p_t,n,j . c_s,j + q^R_t,n . r_s) / sqrt(H + P)) c_s,j) W_n,j

A device that has slice j of the cache needs no other: the strategy `latent` gives slices to devices
and adds up what they give. One slice is multi-head latent attention. More are an approximation of
it: a slice knows a part of each score, of which a_j is the share. Any rotation of the latent can be
absorbed in the weights (`absorb`) and leaves latent attention as it is, so it is chosen for slices
that stand for the whole: a Hadamard matrix gives them norms alike, principal components give the
first ones most of each score. Prefill may use latent attention itself, on the same cache.

Shapes: B batch, T queries, S keys, N heads, H head dim without rotation, P rotated dim, V value
dim, J slices, R rank of a slice, D model dim.
Unlike the paper: a_j, its 1 / mu, is an argument, where it gives the value for principal components
alone (eq. 25 there; its alpha is once the share and once the inverse, here always the share). The
alignment by training is left out.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnjax.core import layers, masks, positions, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops


def tpla(
    q: Float[Array, "B T N H"],
    q_rope: Float[Array, "B T N P"],
    latent: Float[Array, "B S J R"],
    k_rope: Float[Array, "B S P"],
    up: Float[Array, "J R N F"],
    shares: Float[Array, "J"] | None = None,
    *,
    mask: masks.Mask | None = None,
    q_offset: int | Int[Array, ""] = 0,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """Eq. 7 for F = H + V, in latent's dtype.

    Args:
      latent: c, normalised; k_rope: r, rotated as q_rope is.
      up: U and W side by side.
      shares: a; 1 for each slice where None. Other options: `ops.dot_product_attention`.
    """
    H, J = q.shape[-1], latent.shape[2]
    up_key, up_value = jnp.split(up.astype(latent.dtype), [H], -1)
    options = dict(mask=mask, q_offset=q_offset, implementation=implementation)

    def of_slice(x):
        c, up_key, up_value, share = x
        p = jnp.einsum("BTNH,RNH->BTNR", q, up_key) / share.astype(q.dtype)
        p = jnp.concatenate([p, q_rope], -1)
        k = jnp.concatenate([c, k_rope], -1)[:, :, None]
        scale = (H + q_rope.shape[-1]) ** -0.5
        o = ops.dot_product_attention(p, k, c[:, :, None], scale=scale, **options)
        return jnp.einsum("BTNR,RNV->BTNV", o, up_value).astype(jnp.float32)

    shares = jnp.ones(J) if shares is None else shares
    by_slice = jnp.moveaxis(latent, 2, 0), up_key, up_value, shares
    return jax.lax.map(of_slice, by_slice).sum(0).astype(latent.dtype)


def normalise(
    latent: Float[Array, "*B J R"], shares: Float[Array, "J"] | None = None, *, epsilon=1e-6
) -> Float[Array, "*B J R"]:
    """Each slice by its own root mean square, from which that of the whole is estimated (eq. 19).

    Slices of equal shares are divided by their own, as they are where shares is None.
    """
    x = latent.astype(jnp.float32)
    weight = 1.0 if shares is None else (shares * len(shares)).reshape((1,) * (x.ndim - 2) + (-1,))
    square = jnp.mean(x**2, -1) / weight
    return (x * jax.lax.rsqrt(square + epsilon)[..., None]).astype(latent.dtype)


def absorb(
    down: Float[Array, "D L"],
    gain: Float[Array, "L"],
    up: Float[Array, "L N F"],
    rotation: Float[Array, "L L"],
) -> tuple[Float[Array, "D L"], Float[Array, "L N F"]]:
    """(down, up) of the same latent attention with the gain of its norm 1 and c rotated (eq. 17).

    rotation is orthogonal, with the new axes as columns.
    """
    return down @ rotation, jnp.einsum("LM,LNF->MNF", rotation, gain[:, None, None] * up)


def hadamard(key: jax.Array, size: int) -> Float[Array, "L L"]:
    """An orthogonal matrix of +- 1/sqrt(size), with signs drawn for its rows (section 4.3.1).

    Raises ValueError for a size that is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"{size=} must be a power of two")
    matrix = jnp.ones((1, 1))
    while len(matrix) < size:
        matrix = jnp.block([[matrix, matrix], [matrix, -matrix]])
    return jax.random.rademacher(key, (size, 1), jnp.float32) * matrix * size**-0.5


def principal(
    latents: Float[Array, "*B L"], slices: int
) -> tuple[Float[Array, "L L"], Float[Array, "J"]]:
    """(rotation to principal axes, the largest first; shares of the slices) (section 4.3.2).

    Of second moments, which are what norms and products consist of. Raises ValueError for slices
    that don't divide L.
    """
    L = latents.shape[-1]
    if slices < 1 or L % slices:
        raise ValueError(f"{slices=} must divide {L=}")
    x = latents.astype(jnp.float32).reshape(-1, L)
    values, axes = jnp.linalg.eigh(x.T @ x)  # rising
    values = jnp.maximum(values[::-1], 0).reshape(slices, -1).sum(1)
    return axes[:, ::-1], values / values.sum()


class SlicedCache(NamedTuple):
    """Latents and rotated keys seen so far; `length` of them are filled."""

    latent: Float[Array, "B S J R"]
    k_rope: Float[Array, "B S P"]
    length: Int[Array, ""]

    def append(self, latent: Float[Array, "B T J R"], k_rope: Float[Array, "B T P"]):
        """The cache with T more tokens."""
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
            old, new.astype(old.dtype), self.length, 1
        )
        length = self.length + latent.shape[1]
        return SlicedCache(write(self.latent, latent), write(self.k_rope, k_rope), length)


class TPLA(nn.Module):
    """Eqs. 6 and 7 over (B T D), values as wide as H.

    rank, of all slices together, is 4 H where None, and rope_dim H / 2. shares are those of the
    slices, 1 in scores where None. The norm has no gain: it is a part of the kernel. Streaming is
    causal.
    """

    num_heads: int
    head_dim: int
    slices: int = 2
    rank: int | None = None
    rope_dim: int | None = None
    shares: tuple[float, ...] | None = None
    rotary_base: float = 10_000.0
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = tpla

    def setup(self):
        N, H = self.num_heads, self.head_dim
        L, P = self._sizes()
        if L % self.slices:
            raise ValueError(f"slices={self.slices} must divide rank={L}")
        if self.shares is not None and len(self.shares) != self.slices:
            raise ValueError(f"shares={self.shares} must be of slices={self.slices}")
        self.query = layers.HeadProjection(N, H, self.dtype)
        self.query_rope = layers.HeadProjection(N, P, self.dtype)
        self.compress = layers.Dense(L, use_bias=False, dtype=self.dtype)
        self.key_rope = layers.HeadProjection(1, P, self.dtype)
        self.heads = layers.HeadKernel((L, N, 2 * H))
        self.attend = layers.Attend(self.fn)
        self.out = layers.OutputProjection(self.dtype)

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says what each token sees."""
        q, q_rope, latent, k_rope = self._project(x, jnp.arange(x.shape[1]))
        weights = self._slice(self.heads()), self._shares()
        return self.out(self.attend(q, q_rope, latent, k_rope, *weights, mask=mask), x.shape[-1])

    def init_state(self, batch: int, length: int) -> SlicedCache:
        """An empty cache of `length` tokens."""
        L, P = self._sizes()
        empty = lambda *shape: jnp.zeros((batch, length, *shape), self.dtype or jnp.float32)
        latent = empty(self.slices, L // self.slices)
        return SlicedCache(latent, empty(P), jnp.zeros((), jnp.int32))

    def extend(
        self, state: SlicedCache, x: Float[Array, "B T D"]
    ) -> tuple[SlicedCache, Float[Array, "B T D"]]:
        """The next T tokens; each sees those before it and itself."""
        q, q_rope, *new = self._project(x, state.length + jnp.arange(x.shape[1]))
        cache, causal = state.append(*new), dict(mask=masks.Causal(), q_offset=state.length)
        arrays = q, q_rope, cache.latent, cache.k_rope, self._slice(self.heads()), self._shares()
        return cache, self.out(self.attend(*arrays, **causal), x.shape[-1])

    def _sizes(self):
        """L and P."""
        return self.rank or 4 * self.head_dim, self.rope_dim or self.head_dim // 2

    def _shares(self):
        return None if self.shares is None else jnp.asarray(self.shares)

    def _slice(self, kernel):
        return kernel.reshape(self.slices, -1, *kernel.shape[1:])

    def _project(self, x, at):
        rotate = lambda x: positions.rotary(x, at, base=self.rotary_base)
        c = self.compress(x)
        c = c.reshape(*c.shape[:-1], self.slices, -1)
        c = normalise(c, self._shares())
        return self.query(x), rotate(self.query_rope(x)), c, rotate(self.key_rope(x))[:, :, 0]


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
    arrays = dict(q=draw(0, 2, T, 4, 8), q_rope=draw(1, 2, T, 4, 4), latent=draw(2, 2, T, 4, 5))
    arrays |= dict(k_rope=draw(3, 2, T, 4), up=draw(4, 4, 5, 4, 8 + 6) / 4)
    return arrays | dict(shares=jnp.array([0.4, 0.3, 0.2, 0.1]))


def _oracle(q, q_rope, latent, k_rope, up, shares, *, mask=None):
    H, o = q.shape[-1], 0.0
    for j in range(latent.shape[2]):
        k, v = (
            jnp.einsum("BSR,RNF->BNSF", latent[:, :, j], w)
            for w in (up[j, ..., :H], up[j, ..., H:])
        )
        x = jnp.einsum("BTNH,BNSH->BNTS", q / shares[j], k)
        x = (x + jnp.einsum("BTNP,BSP->BNTS", q_rope, k_rope)) / jnp.sqrt(H + q_rope.shape[-1])
        x = jnp.where(masks.dense(mask, *x.shape[2:]), x, -1e30)
        o = o + jnp.einsum("BNTS,BNSV->BTNV", jax.nn.softmax(x), v)
    return o


SPEC = registry.Mechanism(
    fn=tpla,
    module=TPLA,
    small=dict(num_heads=4, head_dim=8, rank=16),
    papers=("tpla",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(mask=masks.Causal())),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.STREAMABLE,
            Claim.LINEAR_MEMORY,
            Claim.CONTEXT_PARALLEL,
            Claim.FORWARD_MODE,
        }
    ),
    context=("gather", "latent"),
)
