r"""BAM: trained models become the experts of one, in attention as in the feed-forward layers.

Paper: Zhang et al., "BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of
Experts", arXiv:2408.08274.

    y_t   = x + sum_e p_e attention_e(norm(x)) + sum_a gate_a ffn_a(norm(x))
    p     = softmax(norm(x) W_p)                                          over all E experts
    gate  = of the A experts that a second router likes best

Every token goes through all experts of attention, and through A of the feed-forward ones, both at
once. Experts have queries and outputs of their own, and keys and values, too, or those in common:
then one cache serves all. In memory the experts of a head lie side by side, so that sharing is
grouped-query attention with E queries to a key head.

Shapes: B batch, T queries, S keys, E experts, N = E times the heads of one, head n being of expert
n % E, K kv-heads (N, or N / E where shared), H head dim, V value dim, D model dim, F width within.
Unlike the paper: feed-forward layers are GELU ones, and their gates add up to one. How many of them
a token takes in the paper, and with which losses, is not known here. That upcycling so is better
than upcycling feed-forward layers alone the paper shows by training, and nothing here does.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, PyTree

from attnjax.core import attention, decode, layers, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import routing

KeysAndValues = Literal["own", "shared"]


def bam(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    logits: Float[Array, "B T E"],
    *,
    mask: masks.Mask | None = None,
    score_mod: Callable[..., jax.Array] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """Heads times p of their expert, in v's dtype. Options: `ops.dot_product_attention`.

    Raises ValueError where N is no multiple of E.
    """
    N, E = q.shape[2], logits.shape[-1]
    if N % E:
        raise ValueError(f"{N} heads must be a multiple of the {E} experts")
    attend = functools.partial(ops.dot_product_attention, implementation=implementation)
    o = attend(q, k, v, mask=mask, score_mod=score_mod, q_offset=q_offset)
    p = jnp.tile(jax.nn.softmax(logits.astype(jnp.float32)), N // E)
    return (p[..., None] * o).astype(v.dtype)


class Bam(attention.KeyValueAttention):
    """The mixture of attention over (B T D); num_heads counts those of all experts together.

    num_kv_heads None gives keys and values to each expert, num_heads / num_experts shares them.
    """

    num_experts: int = 2
    fn: Callable[..., jax.Array] = bam

    def setup(self):
        super().setup()
        N, K, E = self.num_heads, self.num_kv_heads or self.num_heads, self.num_experts
        if E < 1 or N % E or K not in (N, N // E):
            raise ValueError(f"num_experts={E} must divide {N} heads, {K=} be {N} or {N}/{E}")
        self.router = layers.Dense(E, use_bias=False, dtype=self.dtype)

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; `mask` says what each token sees."""
        q, k, v = self._project(x, jnp.arange(x.shape[1]))
        return self.out(self.attend(q, k, v, self.router(x), mask=mask), x.shape[-1])

    def extend(
        self, state: decode.KVCache, x: Float[Array, "B T D"]
    ) -> tuple[decode.KVCache, Float[Array, "B T D"]]:
        """The next T tokens, each of which sees those before it and itself."""
        q, k, v = self._project(x, state.length + jnp.arange(x.shape[1]))
        cache, at = state.append(k, v), dict(mask=masks.Causal(), q_offset=state.length)
        return cache, self.out(self.attend(q, cache.k, cache.v, self.router(x), **at), x.shape[-1])


class BamBlock(nn.Module):
    """y over (B T D); with num_experts=1 the dense model that `upcycle` takes."""

    num_heads: int
    head_dim: int
    mlp_dim: int
    num_kv_heads: int | None = None
    rotary_base: float | None = None
    num_experts: int = 2
    topk: int = 1
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention and feed-forward layer from one norm; `mask` says what each token sees."""
        E, D, F = self.num_experts, x.shape[-1], self.mlp_dim
        y = nn.RMSNorm(dtype=self.dtype, name="norm")(x)
        heads = self.num_heads, self.head_dim, self.num_kv_heads, self.rotary_base
        mixed = Bam(*heads, dtype=self.dtype, num_experts=E, name="attention")(y, mask=mask)
        init = nn.initializers.lecun_normal(batch_axis=0)
        up = layers.Table((E, D, F), init, name="up")()
        down = layers.Table((E, F, D), init, name="down")()
        logits = layers.Dense(E, use_bias=False, dtype=self.dtype, name="router")(y)
        return x + mixed + routing.mixture_mlp(y, up, down, logits, topk=self.topk)


def upcycle(
    seeds: Sequence[PyTree], key: Key[Array, ""], *, keys_and_values: KeysAndValues = "own"
) -> PyTree:
    """Parameters of BamBlocks with an expert for each of `seeds`, parameters of dense ones.

    Queries, outputs and feed-forward layers become experts, and keys and values where they are
    "own"; routers are drawn anew, and the rest, "shared" keys and values included, is averaged.
    Raises ValueError for other `keys_and_values`.
    """
    if keys_and_values not in get_args(KeysAndValues):
        raise ValueError(f"{keys_and_values=} must be one of {get_args(KeysAndValues)}")
    heads_at = dict(query=1, key=1, value=1, out=0)  # the axis of kernels that heads are along
    own = set(heads_at) if keys_and_values == "own" else {"query", "out"}
    leaves, tree = jax.tree.flatten(seeds[0])
    keys = tree.unflatten(list(jax.random.split(key, len(leaves))))

    def merge(path, key, *leaves):
        *names, kind, _ = ["", *(entry.key for entry in path)]
        if kind in ("heads", "merge") and names[-1] in own:
            return _interleave(leaves, heads_at[names[-1]])
        if kind in ("up", "down"):
            return jnp.concatenate(leaves)
        if names[-1] == "router":
            shape = *leaves[0].shape[:-1], len(leaves)
            return nn.initializers.lecun_normal()(key, shape, leaves[0].dtype)
        return sum(leaves) / len(leaves)

    return jax.tree.map_with_path(merge, keys, *seeds)


def _interleave(kernels, axis):
    """Kernels with heads along `axis` as one, in which head n of all lies side by side."""
    before, after = kernels[0].shape[:axis], kernels[0].shape[axis + 1 :]
    return jnp.stack(kernels, axis + 1).reshape(*before, -1, *after)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 6, 8))
    logits = jax.random.normal(jax.random.fold_in(key, 1), (2, T, 3))
    return dict(q=q, k=k[:, :, :2], v=v[:, :, :2], logits=logits)


def _oracle(q, k, v, logits, *, mask=None):
    E, K, p = logits.shape[-1], k.shape[2], jax.nn.softmax(logits)
    heads = []
    for n in range(q.shape[2]):
        group = n * K // q.shape[2]
        x = q[:, :, n] @ k[:, :, group].mT / jnp.sqrt(q.shape[-1])
        x = jnp.where(masks.dense(mask, *x.shape[1:])[:, 0], x, -1e30)
        heads.append(p[:, :, n % E, None] * (jax.nn.softmax(x) @ v[:, :, group]))
    return jnp.stack(heads, 2)


SPEC = registry.Mechanism(
    fn=bam,
    module=Bam,
    small=dict(num_heads=4, head_dim=8, num_kv_heads=2, num_experts=2),
    papers=("bam",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(mask=masks.Causal())),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.PERMUTATION_EQUIVARIANT,
            Claim.STREAMABLE,
            Claim.DENSE_TWIN,
            Claim.LINEAR_MEMORY,
            Claim.FORWARD_MODE,
            Claim.CONTEXT_PARALLEL,
        }
    ),
    context=("gather",),
)
