"""A vision transformer around any mechanism over sequences or grids, or several in turn.

    model = models.create("vit", image_size=[32, 32], channels=3, num_classes=10, features=64,
                          depth=6, num_heads=4, mixers=["swin(window=4)"], stem="conv")
    logits = model.apply({"params": params}, image)                   # (B X Y C) -> (B classes)

Papers: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929; for the stem, Xiao
et al., "Early Convolutions Help Transformers See Better", arXiv:2106.14881, section 4.
"""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import layers, positions, registry
from attnjax.models import backbone, block

Stem = Literal["patch", "conv"]
Positions = Literal["learned", "sinusoidal", "none"]


class Patches(nn.Module):
    """(B X*patch Y*patch C) -> (B X Y D): each patch of pixels projected."""

    patch: int
    features: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Float[Array, "B XP YP C"]) -> Float[Array, "B X Y D"]:
        B, X, Y, C = x.shape
        x = x.reshape(B, X // self.patch, self.patch, Y // self.patch, self.patch, C)
        x = x.swapaxes(2, 3).reshape(B, X // self.patch, Y // self.patch, -1)
        return layers.Dense(self.features, dtype=self.dtype, name="project")(x)


class Convolutions(nn.Module):
    """(B X*patch Y*patch C) -> (B X Y D): a 3x3 convolution for each halving, and one more."""

    patch: int
    features: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Float[Array, "B XP YP C"]) -> Float[Array, "B X Y D"]:
        halvings = self.patch.bit_length() - 1
        if self.patch != 2**halvings or self.features % self.patch:
            raise ValueError(
                f"patch={self.patch} must be a power of two that divides features={self.features}"
            )
        for i in range(halvings):
            features = self.features // 2 ** (halvings - i)
            x = layers.Conv(features, (3, 3), (2, 2), dtype=self.dtype, name=f"halve_{i}")(x)
            x = nn.gelu(nn.RMSNorm(dtype=self.dtype, name=f"norm_{i}")(x))
        return layers.Conv(self.features, (3, 3), dtype=self.dtype, name="project")(x)


class ViT(backbone.Backbone, kw_only=True):
    """Images to logits of classes.

    Attributes (the others: `backbone.Backbone`):
      image_size: X and Y in pixels, multiples of patch.
      pool: "mean", "cls" (one more token, which mechanisms over grids can't take), or a mechanism
        over sets, as "set_transformer(num_seeds=1)", and the mean of what it gives.
    """

    image_size: tuple[int, int]
    channels: int
    num_classes: int
    patch: int = 4
    mixers: tuple[str, ...] = ("multi_head_attention",)
    activation: block.Activation = "gelu"
    stem: Stem = "patch"
    pool: str = "mean"
    positions: Positions = "learned"

    def setup(self):
        self._check_fields()
        stem = dict(patch=Patches, conv=Convolutions)[self.stem]
        self.patches = stem(self.patch, self.features, self.dtype)
        X, Y = (n // self.patch for n in self.image_size)
        if self.positions == "learned":
            self.place = layers.Table((X, Y, self.features))
        self._build_blocks()
        self.norm = nn.RMSNorm(dtype=self.dtype)
        if self.pool == "cls":
            self.cls = layers.Table((self.features,))
        elif self.pool != "mean":
            options = dict(num_heads=self.num_heads, head_dim=self._head_dim, dtype=self.dtype)
            self.pooling = registry.build(self.pool, **options)
        self.head = layers.Dense(self.num_classes, dtype=jnp.float32)

    def __call__(self, image: Float[Array, "B X Y C"]) -> Float[Array, "B F"]:
        """Logits in float32. Raises ValueError for another size or a mechanism that can't fit."""
        expected = (*self.image_size, self.channels)
        if image.shape[1:] != expected:
            raise ValueError(f"an image must be {expected}, not {image.shape[1:]}")
        x = self._placed(self.patches(image))
        x, _ = self._through(lambda layer, x, _: (layer(x), None), x)
        return self.head(self._pooled(self.norm(x)))

    def _placed(self, x):
        B, X, Y, D = x.shape
        if self.positions == "learned":
            x = x + self.place()[None].astype(x.dtype)
        elif self.positions == "sinusoidal":
            x = x + _sinusoidal(X, Y, D)[None].astype(x.dtype)
        if self.pool != "cls":
            return x
        cls = jnp.broadcast_to(self.cls()[None, None].astype(x.dtype), (B, 1, D))
        return jnp.concatenate([cls, x.reshape(B, X * Y, D)], 1)

    def _pooled(self, x):
        if self.pool == "cls":
            return x[:, 0]
        x = x.reshape(x.shape[0], -1, self.features)
        return (x if self.pool == "mean" else self.pooling(x)).mean(1)

    def _check_fields(self):
        self._check(stem=Stem, positions=Positions)
        if any(n % self.patch for n in self.image_size):
            raise ValueError(f"{self.image_size=} must be multiples of {self.patch=}")
        layouts = ("sequence",) if self.pool == "cls" else ("sequence", "grid")
        fits = lambda record: record.layout in layouts
        what = (
            f"a mechanism over a {' or a '.join(layouts)}, as a vit with pool={self.pool!r} needs"
        )
        backbone.require(self.mixers, fits, what)
        if self.pool not in ("mean", "cls"):
            pools = lambda record: record.layout == "set"
            backbone.require([self.pool], pools, "'mean', 'cls' or a mechanism over a set")


def _sinusoidal(X, Y, D):
    """Waves along X in the first half of the features, along Y in the second: (X Y D)."""
    x = positions.sinusoidal(X, D // 2)[:, None]
    y = positions.sinusoidal(Y, D - D // 2)[None, :]
    spread = lambda wave: jnp.broadcast_to(wave, (X, Y, wave.shape[-1]))
    return jnp.concatenate([spread(x), spread(y)], -1)


MODEL = ViT
