r"""EViT: keep the tokens that the class token attends to, and fuse the others into one.

Paper: Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
Reorganizations", arXiv:2202.07800, section 3.

    a_j   = mean over heads of the attention of the class token to token j
    kept  = the ceil(keep_rate P) of the P = T - 1 tokens with the largest a_j
    fused = sum over the others of a_j x_j
    y     = [x_class, x_kept, x_fused]

between attention and feed-forward of chosen layers (4, 7 and 10 of 12).

Shapes: B batch, T tokens with the class token first, N heads, D model dim.
Unlike the paper: kept tokens stay in their order, where the authors' code sorts them by a_j (a
transformer can't tell). As in that code, the weights of the fused token don't add up to 1, and
nothing is fused where all tokens are kept.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.core import registry


def evit(
    x: Float[Array, "B T D"],
    row: Float[Array, "B T"],
    *,
    keep_rate: float = 0.7,
    others: Literal["fuse", "drop"] = "fuse",
) -> Float[Array, "B U D"]:
    """The tokens after a reorganisation by the class token's attention `row` (`class_row`).

    U is `tokens_after(T, ...)`. Raises ValueError for a keep_rate that is not in (0, 1].
    """
    if others not in ("fuse", "drop"):
        raise ValueError(f"{others=} must be 'fuse' or 'drop'")
    B, T, _ = x.shape
    k = _kept(T, keep_rate)
    if k == T - 1:
        return x
    patches, a = x[:, 1:], row[:, 1:].astype(jnp.float32)
    index = jnp.sort(jax.lax.top_k(a, k)[1])
    kept = jnp.take_along_axis(patches, index[..., None], 1)
    if others == "drop":
        return jnp.concatenate([x[:, :1], kept], 1)
    rest = a.at[jnp.arange(B)[:, None], index].set(0)
    fused = jnp.einsum("BP,BPD->BD", rest, patches.astype(jnp.float32)).astype(x.dtype)
    return jnp.concatenate([x[:, :1], kept, fused[:, None]], 1)


def class_row(weights: Float[Array, "B N T S"]) -> Float[Array, "B S"]:
    """The attention of the first token, averaged over heads."""
    return weights[:, :, 0].mean(1)


def tokens_after(
    T: int, *, keep_rate: float = 0.7, others: Literal["fuse", "drop"] = "fuse"
) -> int:
    """How many of T tokens are left, the class token and the fused one included."""
    k = _kept(T, keep_rate)
    return 1 + k + (others == "fuse" and k < T - 1)


def warm_up(progress: float, *, keep_rate: float = 0.7) -> float:
    """The rate to train with at `progress` from 0 to 1: from 1 to keep_rate by half a cosine.

    A number of tokens is static, so a training step is compiled anew where that number changes.
    """
    return keep_rate + (1 - keep_rate) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def _kept(T, keep_rate):
    if not 0 < keep_rate <= 1:
        raise ValueError(f"{keep_rate=} must be in (0, 1]")
    return math.ceil(keep_rate * (T - 1))


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    keys = jax.random.split(key)
    row = jax.nn.softmax(jax.random.normal(keys[1], (2, T)))
    return dict(x=jax.random.normal(keys[0], (2, T, 8)), row=row)


def _oracle(x, row, *, keep_rate=0.7, others="fuse"):
    """One image at a time, by the rank of each token."""
    P = x.shape[1] - 1
    count = math.ceil(keep_rate * P)

    def image(x, row):
        order = jnp.argsort(-row[1:]) + 1
        kept, rest = jnp.sort(order[:count]), order[count:]
        parts = [x[:1], x[kept]]
        if others == "fuse" and count < P:
            parts.append((row[rest][:, None] * x[rest]).sum(0)[None])
        return jnp.concatenate(parts)

    return jax.vmap(image)(x, row)


SPEC = registry.Intervention(
    fn=evit,
    papers=("evit",),
    example=_example,
    oracle=_oracle,
    identity=dict(keep_rate=1.0),
    untouched=lambda x, row: x,
    variants=({}, dict(keep_rate=0.3), dict(keep_rate=0.5, others="drop")),
    size=lambda y: y.shape[1],
    budget=lambda x, row, **options: tokens_after(x.shape[1], **options),
)
