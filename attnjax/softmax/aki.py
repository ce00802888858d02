r"""AKI: image tokens see the question that follows them (modality-mutual attention).

Paper: Wang et al., "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual
Attention for Multimodal LLMs", arXiv:2503.02597, section 3; the mask is that of the authors' code.

    o_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s
    over s <= t, and where t is of an image also over the s of a question

    prompt: image i, question q, answer a        i q a
                                               i \ x .
                                               q x \ .
                                               a x x \      x all, \ causal, . none

Nothing is learned. Images see each other causally and answers are seen by nobody before them, so an
answer is decoded as usual from the keys and values of its prompt. From the second layer on a token
of the question knows, by way of the image, those after it: only answers can be trained on.

Shapes: B batch, T queries, S keys, N heads, K kv-heads, H head dim, V value dim, D model dim.
Unlike the paper: there may be any number of images and questions, in any order; the authors take
one question, and of several images open the mask for the last.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnjax.core import attention, decode, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops

IMAGE, QUESTION = 1, 2  # kinds of tokens; every other number is text seen causally


def aki(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    kinds: Int[Array, "B S"],
    *,
    mask: masks.Mask | None = None,
    score_mod: Callable[..., jax.Array] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """Attention under `mutual(kinds)`, in v's dtype. Options: `ops.dot_product_attention`.

    Args:
      kinds: of the tokens by position, queries' too.
      mask: what else limits what a token sees; `masks.Causal()` leaves plain causal attention.
    """
    seen = mutual(kinds) if mask is None else mutual(kinds) & mask
    options = dict(score_mod=score_mod, q_offset=q_offset, implementation=implementation)
    return ops.dot_product_attention(q, k, v, mask=seen, **options)


def mutual(kinds: Int[Array, "B S"]) -> masks.Mask:
    """Causal, and from images to questions."""
    image, question = kinds == IMAGE, kinds == QUESTION
    return masks.Causal() | masks.Segments(jnp.where(image, 1, 0), jnp.where(question, 1, -1))


class Aki(attention.KeyValueAttention):
    """Modality-mutual attention over (B T D). Without `kinds` all is text, seen causally."""

    fn: Callable[..., jax.Array] = aki

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: masks.Mask | None = None,
        kinds: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself, tokens being of these `kinds`."""
        kinds = jnp.zeros(x.shape[:2], jnp.int32) if kinds is None else kinds
        q, k, v = self._project(x, jnp.arange(x.shape[1]))
        return self.out(self.attend(q, k, v, kinds, mask=mask), x.shape[-1])

    def extend(
        self,
        state: decode.KVCache,
        x: Float[Array, "B T D"],
        *,
        kinds: Int[Array, "B T"] | None = None,
    ) -> tuple[decode.KVCache, Float[Array, "B T D"]]:
        """The next T tokens. An image sees a question after it only where both are in x."""
        kinds = jnp.zeros(x.shape[:2], jnp.int32) if kinds is None else kinds
        q, k, v = self._project(x, state.length + jnp.arange(x.shape[1]))
        cache = state.append(k, v)
        before = jnp.zeros(cache.k.shape[:2], kinds.dtype)  # is seen causally, of any kind
        kinds = jax.lax.dynamic_update_slice_in_dim(before, kinds, state.length, 1)
        o = self.attend(q, cache.k, cache.v, kinds, q_offset=state.length)
        return cache, self.out(o, x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k, v=v, kinds=jax.random.randint(key, (2, T), 0, 3))


def _oracle(q, k, v, kinds, *, mask=None):
    T, S = q.shape[1], k.shape[1]
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    seen = jnp.tril(jnp.ones((T, S), bool))[None]
    seen = seen | ((kinds[:, :T, None] == 1) & (kinds[:, None, :] == 2))
    seen = seen[:, None] & masks.dense(mask, T, S)
    return jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(jnp.where(seen, x, -1e30)), v)


SPEC = registry.Mechanism(
    fn=aki,
    module=Aki,
    small=dict(num_heads=4, head_dim=8),
    papers=("aki",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(implementation="blocked"), dict(mask=masks.Causal())),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.CROSS,
            Claim.STREAMABLE,
            Claim.DENSE_TWIN,
            Claim.LINEAR_MEMORY,
            Claim.CONTEXT_PARALLEL,
            Claim.FORWARD_MODE,
        }
    ),
    context=("gather",),
)
