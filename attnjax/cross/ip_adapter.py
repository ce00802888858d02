r"""IP-Adapter: decoupled cross-attention, to text and to image tokens by a softmax each.

Paper: Ye et al., "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion
Models", arXiv:2308.06721, section 3.2, eqs. 5 and 8.

    y = softmax(Q K^T / sqrt(H)) V + strength * softmax(Q K'^T / sqrt(H)) V'
    Q = x W_q,   K, V = text W_k, text W_v,   K', V' = image W'_k, image W'_v

Only W'_k, W'_v and the projection that makes the image tokens are trained; W'_k and W'_v begin as
copies of W_k and W_v. One softmax over all tokens would make the two prompts compete instead.
Shapes: B batch, T queries, S keys (text, then image), N heads, H head dim, V value dim, D model
dim. Unlike the paper: the projections have no biases.
"""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from attnjax.core import layers, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops

_COPIED = dict(image_key="key", image_value="value")  # names of parameters, new from old
_NEW = {"image_key", "image_value", "image_tokens"}


def ip_adapter(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N V"],
    *,
    num_image_tokens: int = 4,
    strength: float | Float[Array, ""] = 1.0,
    mask: masks.Mask | None = None,
    score_mod: Callable[..., jax.Array] | None = None,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """Eq. 8, where the last `num_image_tokens` keys and values are K' and V'.

    With strength 0 it is cross-attention to the text alone, to the last bit. `mask` and
    `score_mod` go by positions in all S; other options: `ops.dot_product_attention`. Raises
    ValueError where there isn't at least one token of each kind.
    """
    S, T = k.shape[1], q.shape[1]
    if not 0 < num_image_tokens < S:
        raise ValueError(f"{num_image_tokens=} must be positive and less than {S=}")
    options = dict(mask=mask, score_mod=score_mod, implementation=implementation)

    def attend(first, last):
        at = np.arange(T), np.arange(first, last)
        part = k[:, first:last], v[:, first:last]
        return ops.dot_product_attention(q, *part, positions=at, **options)

    text = S - num_image_tokens
    return attend(0, text) + jnp.asarray(strength, v.dtype) * attend(text, S)


def copy_projections(params: PyTree) -> PyTree:
    """`params` in which W'_k and W'_v are W_k and W_v, at every IP-Adapter in the tree."""
    if not isinstance(params, Mapping):
        return params
    return {name: copy_projections(params[_COPIED.get(name, name)]) for name in params}


def trainable(params: PyTree) -> PyTree:
    """A tree of bools shaped like `params`: what the paper trains is True, the rest is frozen."""
    is_new = lambda path: any(getattr(part, "key", None) in _NEW for part in path)
    return jax.tree.map_with_path(lambda path, _: is_new(path), params)


class ImageTokens(nn.Module):
    """The embedding of an image as a few tokens; call it "image_tokens" in a model."""

    features: int
    num_image_tokens: int = 4
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, embedding: Float[Array, "B F"]) -> Float[Array, "B M D"]:
        """A linear map, cut into `num_image_tokens` tokens that are normalised."""
        M, D = self.num_image_tokens, self.features
        tokens = layers.Dense(M * D, dtype=self.dtype, name="project")(embedding)
        return nn.LayerNorm(dtype=self.dtype, name="norm")(tokens.reshape(-1, M, D))


class IPAdapter(nn.Module):
    """Cross-attention of x (B T D) to context: text tokens, then `num_image_tokens` of an image."""

    num_heads: int
    head_dim: int
    num_image_tokens: int = 4
    strength: float = 1.0
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = ip_adapter

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S F"],
        *,
        mask: masks.Mask | None = None,
    ) -> Float[Array, "B T D"]:
        """`mask` says what each token sees of the whole context."""
        heads = functools.partial(layers.HeadProjection, self.num_heads, self.head_dim, self.dtype)
        text, image = jnp.split(context, [context.shape[1] - self.num_image_tokens], axis=1)
        both = lambda a, b: jnp.concatenate([heads(name=a)(text), heads(name=b)(image)], axis=1)
        q, k, v = heads(name="query")(x), both("key", "image_key"), both("value", "image_value")
        options = dict(num_image_tokens=self.num_image_tokens, strength=self.strength)
        o = layers.Attend(self.fn, name="attend")(q, k, v, mask=mask, **options)
        return layers.OutputProjection(self.dtype, name="out")(o, x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    queries, keys = jax.random.split(key)
    k, v = jax.random.normal(keys, (2, 2, T + 4, 4, 8))
    return dict(q=jax.random.normal(queries, (2, T, 4, 8)), k=k, v=v)


def _oracle(q, k, v, *, num_image_tokens=4, strength=1.0, mask=None):
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    x = jnp.where(masks.dense(mask, q.shape[1], k.shape[1]), x, -1e30)
    text, image = jnp.split(x, [-num_image_tokens], axis=-1)
    weights = jnp.concatenate([jax.nn.softmax(text), strength * jax.nn.softmax(image)], axis=-1)
    return jnp.einsum("BNTS,BSNV->BTNV", weights, v)


SPEC = registry.Mechanism(
    fn=ip_adapter,
    module=IPAdapter,
    small=dict(num_heads=4, head_dim=8),
    papers=("ip-adapter",),
    example=_example,
    oracle=_oracle,
    layout="cross",
    variants=({}, dict(num_image_tokens=2, strength=0.3)),
    claims=frozenset(
        {Claim.MASKABLE, Claim.CROSS, Claim.DENSE_TWIN, Claim.LINEAR_MEMORY, Claim.FORWARD_MODE}
    ),
)
