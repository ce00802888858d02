r"""FlexPrefill: each head of a prompt is given the pattern of blocks that its last queries ask for.

Paper: Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient
Long-Sequence Inference", arXiv:2502.20766, section 3 and algorithms 1 to 4.

    A      = softmax(Q K^T / sqrt(H)),     Q the last C queries: what attention really looks at
    c_j    = sum_{s in block j} mean_t A_ts                        mass of a column of blocks
    g_d    = sum_{t - s in block d} mean_t A_ts                    mass of a diagonal of blocks
    e_j    = softmax_j(mean(Q) . mean_{s in block j}(k_s) / sqrt(H))            an estimate of c
    sqrt(JSD(e, c)) >= tau:   the fewest columns and the fewest diagonals of mass gamma each
    otherwise:                the fewest pairs of blocks of mass gamma by the softmax over block
                              means for every block of queries, taken over the whole map

The first column and the main diagonal are always there. The chosen blocks are attended to exactly
and the others skipped. gamma=1 is full causal attention.

Shapes: B batch, T tokens, N heads, K kv-heads, H head dim, V value dim, C tokens of a block,
L blocks.
Unlike the paper: columns and diagonals are counted by the mass of blocks, where the authors' code
counts single ones and divides. The choice depends on the last queries, so an output depends on
later tokens (through the choice alone): that is neither causal nor streamable. Tokens that follow a
cache get full attention, as the authors' decoding does.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnjax.core import attention, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import block_selection as blocks
from attnjax.ops import dot_product_attention as ops


def flexprefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: masks.Mask | None = None,
    gamma: float = 0.9,
    tau: float = 0.1,
    block: int = 128,
    least: int = 1,
    q_offset: int | Int[Array, ""] = 0,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """Attention of a prompt to itself, each query seeing no later keys; in v's dtype.

    Args:
      mask: honours Causal, which holds anyway; NotImplementedError for others.
      gamma: share of the attention that the chosen blocks are to hold, by their estimates.
      tau: distance below which a head chooses by block means; 0 is never, 1 always.
      least: columns and diagonals that every head gets at least.
      q_offset: other than the int 0, the queries follow a cache and attention is full.
      implementation: of the attention, as in `ops.dot_product_attention`. Blocks that are whole
        tiles of its kernels are skipped there; other sizes take memory for each pair of tokens.

    Raises ValueError for wrong options and for a prompt with other keys than its own.
    """
    masks.select(mask, masks.Causal, by="flexprefill")
    attend = functools.partial(ops.dot_product_attention, implementation=implementation)
    if not (isinstance(q_offset, int) and q_offset == 0):
        return attend(q, k, v, mask=masks.Causal(), q_offset=q_offset)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q {q.shape} must be of the tokens of k {k.shape}")
    selected = select(q, k, gamma=gamma, tau=tau, block=block, least=least)
    mask = masks.Blocks(selected, block, block) & masks.Causal()
    return attend(q, k, v, mask=mask)


def select(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    *,
    gamma: float = 0.9,
    tau: float = 0.1,
    block: int = 128,
    least: int = 1,
) -> Bool[Array, "B N L L"]:
    """The blocks that each head attends to, by block of queries and of keys. Has no gradient."""
    if not (0 <= gamma <= 1 and 0 <= tau <= 1 and block >= 1 and least >= 1):
        raise ValueError(f"{gamma=} and {tau=} must be in [0, 1], {block=} and {least=} at least 1")
    q, k = (x.astype(jnp.float32) for x in jax.lax.stop_gradient((q, k)))
    columns, diagonals = observe(q, k, block)
    by_means = (surprise(q, k, columns, block) < tau)[..., None]
    few = lambda mass: blocks.best(mass.at[..., 0].set(jnp.inf), least)
    fill = lambda mass: (blocks.smallest_set(mass, gamma) & ~by_means) | few(mass)
    columns, diagonals = fill(columns), fill(diagonals)
    L = columns.shape[-1]
    lag = jnp.arange(L)[:, None] - jnp.arange(L)[None, :]
    stripes = columns[..., None, :] | diagonals[..., jnp.maximum(lag, 0)]
    chosen = stripes | (_by_means(q, k, gamma, block) & by_means[..., None])
    return (chosen | (gamma == 1)) & (lag >= 0)[None, None]


def observe(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], block: int
) -> tuple[Float[Array, "B N L"], Float[Array, "B N L"]]:
    """c and g: the attention of the last queries, by column and by diagonal of blocks."""
    (B, T, N, H), K = q.shape, k.shape[2]
    last = q[:, -block:].reshape(B, -1, K, N // K, H)
    t = T - last.shape[1] + jnp.arange(last.shape[1])
    lag = t[:, None] - jnp.arange(T)[None, :]
    x = jnp.einsum("BTKGH,BSKH->BKGTS", last, k) * H**-0.5
    a = jax.nn.softmax(jnp.where((lag >= 0)[None, None, None], x, -jnp.inf))
    a = a.reshape(B, N, *lag.shape) / len(t)
    mass = jnp.zeros((B, N, -(-T // block)))
    columns = mass.at[..., jnp.arange(T) // block].add(a.sum(2))
    return columns, mass.at[..., jnp.maximum(lag, 0) // block].add(a)


def surprise(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    columns: Float[Array, "B N L"],
    block: int,
) -> Float[Array, "B N"]:
    """sqrt(JSD(e, c)) in nats: how little block means say of what the last queries look at."""
    e = jax.nn.softmax(_scores(q[:, -block:].mean(1, keepdims=True), k, block)[:, :, 0])
    middle = (e + columns) / 2
    divergence = jax.scipy.special.rel_entr(jnp.stack([e, columns]), middle[None]).sum((0, -1)) / 2
    return jnp.sqrt(jnp.maximum(divergence, 0))  # rounding can take it below 0


def _scores(q, k, block):
    """Products of queries (B Q N H) and the means of blocks of keys: (B N Q L)."""
    means = jnp.repeat(blocks.means(k, block), q.shape[2] // k.shape[2], 2)
    return jnp.einsum("BQNH,BLNH->BNQL", q, means) * q.shape[-1] ** -0.5


def _by_means(q, k, gamma, block):
    x = _scores(blocks.means(q, block), k, block)
    L = x.shape[-1]
    past = jnp.tril(jnp.ones((L, L), bool))[None, None]
    share = jax.nn.softmax(jnp.where(past, x, -jnp.inf))
    return blocks.smallest_set(share.reshape(*x.shape[:2], L * L), gamma).reshape(x.shape)


class FlexPrefill(attention.KeyValueAttention):
    """Causal attention over (B T D), sparse over a prompt and full where `extend` goes on."""

    gamma: float = 0.9
    tau: float = 0.1
    block: int = 128
    least: int = 1
    fn: Callable[..., jax.Array] = flexprefill

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself."""
        q, k, v = self._project(x, jnp.arange(x.shape[1]))
        options = dict(gamma=self.gamma, tau=self.tau, block=self.block, least=self.least)
        return self.out(self.attend(q, k, v, mask=mask, **options), x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k[:, :, :2], v=v[:, :, :2])


def _oracle(q, k, v, *, gamma=0.9, tau=0.1, block=128, least=1):
    """One head at a time, with the whole matrix, by taking what is largest until it is enough."""
    B, T, N, H = q.shape
    k, v = (jnp.repeat(x, N // k.shape[2], 2) for x in (k, v))
    number, L = jnp.arange(T) // block, -(-T // block)
    member = (jnp.arange(L)[:, None] == number[None]).astype(jnp.float32)
    means = member / member.sum(1, keepdims=True)
    lag = jnp.arange(T)[:, None] - jnp.arange(T)[None]

    def enough(mass, share):
        larger = mass[None] > mass[:, None]
        return jnp.where(larger, mass[None], 0).sum(1) < share * mass.sum()

    def head(q, k, v):
        x = q @ k.T / jnp.sqrt(H)
        x = jnp.where(lag >= 0, x, -1e30)
        late = jnp.arange(T) >= T - block
        a = jax.nn.softmax(x) * (late / late.sum())[:, None]
        c = member @ a.sum(0)
        g = jnp.stack([jnp.where(lag // block == d, a, 0).sum() for d in range(L)])
        e = jax.nn.softmax(means @ k @ q[-block:].mean(0) / jnp.sqrt(H))
        plogp = lambda p: jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum()
        aware = jnp.sqrt(plogp(e) / 2 + plogp(c) / 2 - plogp((e + c) / 2)) < tau
        few = lambda m: (m[None, 1:] > m[1:, None]).sum(1) < least - 1
        first = lambda m: jnp.concatenate([jnp.ones(1, bool), few(m)])
        column, diagonal = ((enough(m, gamma) & ~aware) | first(m) for m in (c, g))
        past = jnp.arange(L)[:, None] - jnp.arange(L)[None]
        rough = jnp.where(past >= 0, means @ q @ (means @ k).T / jnp.sqrt(H), -1e30)
        rough = jax.nn.softmax(rough)
        pairs = enough(rough.reshape(-1), gamma).reshape(L, L) & aware
        chosen = pairs | column[None] | diagonal[past]
        seen = (chosen[number][:, number] | (gamma == 1)) & (lag >= 0)
        return jax.nn.softmax(jnp.where(seen, x, -1e30)).astype(v.dtype) @ v

    return jax.vmap(jax.vmap(head, 1, 1))(q, k, v)


SPEC = registry.Mechanism(
    fn=flexprefill,
    module=FlexPrefill,
    small=dict(num_heads=4, head_dim=8, num_kv_heads=2, block=2, gamma=0.6),
    papers=("flexprefill",),
    example=_example,
    oracle=_oracle,
    variants=(
        {},
        dict(block=8, gamma=0.5, tau=0.0),
        dict(block=5, gamma=0.4, tau=1.0, least=2),
        dict(block=8, gamma=0.7, tau=0.3),
    ),
    claims=frozenset({Claim.DENSE_TWIN, Claim.FUSED, Claim.FORWARD_MODE, Claim.CONTEXT_PARALLEL}),
    context=("all_to_all",),
)
