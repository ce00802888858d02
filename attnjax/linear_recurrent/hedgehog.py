r"""Hedgehog: linear attention whose learned features imitate softmax.

Paper: Zhang et al., "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax
Mimicry", arXiv:2402.04347, section 4.

    phi(x) = [exp(W x), exp(-W x)] / (their sum)                     W (F H), one for each head
    o_t    = sum_s w_ts v_s,     w_ts = phi(q_t) . phi(k_s) / sum_s' phi(q_t) . phi(k_s')
    loss   = mean over t of -sum_s softmax(q_t . k_s / sqrt(H)) log w_ts         to learn W by

Shapes: B batch, T queries, S keys, N heads, H head dim, V value dim, D model dim, F features.
Unlike the paper: the features of a token are divided by their sum, so that exp can't overflow (it
changes nothing for queries, and is a part of the map for keys); W has no bias.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.core import layers, masks, recurrent, registry
from attnjax.core.registry import Claim
from attnjax.ops import decay_attention as decays
from attnjax.ops import linear_attention as ops


def hedgehog(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N V"],
    query_map: Float[Array, "N F H"],
    key_map: Float[Array, "N F H"],
    *,
    mask: masks.Mask | None = None,
    initial_state: Float[Array, "B N F2 V1"] | None = None,
    return_state: bool = False,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B N F2 V1"]]:
    """o in v's dtype, and with `return_state` also the final state in float32.

    Args:
      query_map, key_map: W of queries and of keys.
      mask: without Causal each query sees every key. Also Valid, and, together with Causal,
        Segments of which each is one run of tokens.
      initial_state: sums over the keys before these, F2 = 2F features of V1 = V + 1 columns: those
        of the values and, last, the normaliser's.
    """
    features = phi(q, query_map), phi(k, key_map)
    options = dict(mask=mask, initial_state=initial_state, by="hedgehog")
    o, state = ops.linear_attention(*features, v, **options)
    return (o, state) if return_state else o


def phi(x: Float[Array, "B T N H"], weight: Float[Array, "N F H"]) -> Float[Array, "B T N F2"]:
    """The 2F features of each head, in float32; they sum to 1."""
    x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    z = jnp.einsum("BTNH,NFH->BTNF", x, weight)
    return jax.nn.softmax(jnp.concatenate([z, -z], -1))


def distillation_loss(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    query_map: Float[Array, "N F H"],
    key_map: Float[Array, "N F H"],
    *,
    mask: masks.Mask | None = None,
) -> Float[Array, ""]:
    """Cross-entropy of hedgehog's weights against softmax's, by which to learn the maps.

    A mean over queries, of which one that sees nothing counts 0. The softmax is a constant.
    O(T S) memory.
    """
    seen = masks.dense(mask, q.shape[1], k.shape[1])
    visible = lambda x: jnp.where(seen, x, -1e30)
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
    teacher = jax.lax.stop_gradient(jax.nn.softmax(visible(x / q.shape[-1] ** 0.5)))
    w = jnp.einsum("BTNF,BSNF->BNTS", phi(q, query_map), phi(k, key_map))
    log_student = jax.nn.log_softmax(visible(jnp.log(jnp.maximum(w, 1e-30))))
    return -jnp.mean(jnp.sum(jnp.where(seen, teacher * log_student, 0.0), -1))


class Hedgehog(recurrent.Recurrent):
    """Multi-head attention over (B T D) with learned features in the place of softmax."""

    fn: Callable[..., jax.Array] = hedgehog

    def setup(self):
        N, H = self.num_heads, self.head_dim
        self.query = layers.HeadProjection(N, H, self.dtype)
        self.key = layers.HeadProjection(N, H, self.dtype)
        self.value = layers.HeadProjection(N, H, self.dtype)
        self.query_map = layers.Table((N, H, H), _identity)
        self.key_map = layers.Table((N, H, H), _identity)
        self.attend = layers.Attend(self.fn)
        self.out = layers.OutputProjection(self.dtype)

    def _memory(self, batch) -> Float[Array, "B N F2 V1"]:
        return jnp.zeros((batch, self.num_heads, 2 * self.head_dim, self.head_dim + 1))

    def _project(self, x):
        return self.query(x), self.key(x), self.value(x), self.query_map(), self.key_map()


def _identity(key, shape):
    return jnp.broadcast_to(jnp.eye(*shape[1:])[None], shape)


def _carry(q, k, v, query_map, key_map, *, mask=None):
    """What an initial state is multiplied by until the last token."""
    return decays.carry(jnp.zeros(q.shape[2]), q.shape[1], mask=mask)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    query_map, key_map = jax.random.normal(key, (2, 4, 6, 8)) / 2
    return dict(q=q, k=k, v=v, query_map=query_map, key_map=key_map)


def _oracle(q, k, v, query_map, key_map, *, mask=None):
    def features(x, weight):
        z = jnp.einsum("BTNH,NFH->BTNF", x, weight)
        z = jnp.concatenate([jnp.exp(z), jnp.exp(-z)], -1)
        return z / z.sum(-1, keepdims=True)

    w = jnp.einsum("BTNF,BSNF->BNTS", features(q, query_map), features(k, key_map))
    w = jnp.where(masks.dense(mask, q.shape[1], k.shape[1]), w, 0)
    return jnp.einsum("BNTS,BSNV->BTNV", w / w.sum(-1, keepdims=True), v)


SPEC = registry.Mechanism(
    fn=hedgehog,
    module=Hedgehog,
    small=dict(num_heads=4, head_dim=8),
    papers=("hedgehog",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(mask=masks.Causal())),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.CROSS,
            Claim.PERMUTATION_EQUIVARIANT,
            Claim.STREAMABLE,
            Claim.LINEAR_MEMORY,
            Claim.LINEAR_COMPUTE,
            Claim.CONTEXT_PARALLEL,
            Claim.DENSE_TWIN,
        }
    ),
    context=("pass_state", "all_to_all"),
    carry=_carry,
)
