r"""iLLaMA: a causal mask that comes softly, as a factor of the softmax weights.

Paper: Wang et al., "Adapting LLaMA Decoder to Vision Transformer", arXiv:2404.06773, the section on
the soft mask; that weights are multiplied after the softmax is read from the authors' code.

    w_ts = softmax_s(q_t . k_s / sqrt(H))                       over all keys
    o_t  = sum_s f_ts w_ts v_s,       f_ts = 1 where s <= t and a elsewhere

The softness a goes from 1, bidirectional, to 0 in the first epochs. Nothing is normalised again, so
at a = 0 a token takes only values of the past, but all keys still share its weight. Two attentions
with their lse give this without a matrix of weights: of all keys, and of those up to t,

    o = a o_all + (1 - a) exp(lse_past - lse_all) o_past

The class token has to come after the tokens of the image: at a = 0 the first token takes no value
but its own. A triangle of weights has full rank, where a matrix of near equal weights has rank 1.

Shapes: B batch, T queries, S keys, N heads, K kv-heads, H head dim, V value dim, D model dim.
Unlike the paper: an explicit `masks.Causal()` also takes the keys of the future from the softmax,
which is attention as in LLaMA itself; the rest of the block (RMSNorm, SwiGLU, where the class token
stands, learned positions) belongs to the model.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnjax.core import attention, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops


def illama(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    softness: float | Float[Array, ""] = 0.0,
    mask: masks.Mask | None = None,
    score_mod: Callable[..., jax.Array] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """o in v's dtype, with O(T) memory. Other options: `ops.dot_product_attention`.

    Args:
      softness: a; it may be traced and has a gradient.
      mask: what is left out of the softmax itself.
    """
    options = dict(score_mod=score_mod, q_offset=q_offset, implementation=implementation)
    attend = functools.partial(ops.dot_product_attention, q, k, v, return_lse=True, **options)
    past = masks.Causal() if mask is None else mask & masks.Causal()
    (o_all, lse_all), (o_past, lse_past) = attend(mask=mask), attend(mask=past)
    # a query that sees nothing has lse -inf twice, and -inf - 0 has no NaN
    share = jnp.exp(lse_past - jnp.where(lse_all == -jnp.inf, 0.0, lse_all))[..., None]
    o = softness * o_all.astype(jnp.float32) + (1 - softness) * share * o_past
    return o.astype(v.dtype)


class Illama(attention.KeyValueAttention):
    """Soft-masked attention over (B T D). Streaming is causal, where softness changes nothing."""

    rotary_base: float | None = 10_000.0
    fn: Callable[..., jax.Array] = illama

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: masks.Mask | None = None,
        softness: float | Float[Array, ""] = 0.0,
    ) -> Float[Array, "B T D"]:
        """Attention of x to itself; a training lowers `softness` from 1 to 0."""
        q, k, v = self._project(x, jnp.arange(x.shape[1]))
        return self.out(self.attend(q, k, v, mask=mask, softness=softness), x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k, v=v)


def _oracle(q, k, v, *, softness=0.0, mask=None):
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    T, S = x.shape[2:]
    w = jax.nn.softmax(jnp.where(masks.dense(mask, T, S), x, -1e30))
    factor = softness + (1 - softness) * jnp.tril(jnp.ones((T, S), w.dtype))
    return jnp.einsum("BNTS,BSNV->BTNV", w * factor[None, None], v)


SPEC = registry.Mechanism(
    fn=illama,
    module=Illama,
    small=dict(num_heads=4, head_dim=8),
    papers=("illama",),
    example=_example,
    oracle=_oracle,
    variants=(
        {},
        dict(softness=0.3, implementation="blocked"),
        dict(softness=0.3, mask=masks.Causal()),
    ),
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
