"""Shapes: small images of a few coloured sprites, with the mask of each.

One example, an image of `size` x `size` pixels, is drawn so:

1. The number of sprites, uniformly from `min_sprites` .. `max_sprites`.
2. For each sprite a form (square, disc, triangle), a radius r from size/8 .. size/5 in whole
   pixels, and a centre at least r away from every border, all uniformly. Later sprites cover
   earlier ones. The whole set is drawn again while some sprite shows less than half its pixels.
3. For each sprite red, green or blue, uniformly and with replacement, so that colour alone does
   not tell sprites apart. The background is black.

Masks are of the visible pixels: every pixel is in exactly one. Mask 0 is the background, masks of
sprites that are not there are empty.
"""

import dataclasses
import statistics

import numpy as np

from attnjax.core import registry
from attnjax.tasks import source

_COLOURS = np.eye(3, dtype=np.float32)  # red, green, blue


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes(source.Generated):
    """{"image": float32 [X Y 3] in [0, 1], "masks": bool [max_sprites+1 X Y]}.

    Raises ValueError where the image is too small for three forms to differ, or the numbers of
    sprites are out of order.
    """

    size: int = 24
    min_sprites: int = 2
    max_sprites: int = 3

    def __post_init__(self):
        super().__post_init__()
        if self.size < 16:
            raise ValueError(f"size={self.size} must be at least 16")
        if not 1 <= self.min_sprites <= self.max_sprites <= 6:
            raise ValueError(
                f"min_sprites={self.min_sprites} and max_sprites={self.max_sprites} must be "
                "ordered and in [1, 6]"
            )

    def draw(self, rng: np.random.Generator) -> source.Example:
        count = int(rng.integers(self.min_sprites, self.max_sprites, endpoint=True))
        sprites, visible = self._scene(rng, count)
        while (2 * visible.sum((1, 2)) < sprites.sum((1, 2))).any():
            sprites, visible = self._scene(rng, count)
        masks = np.zeros((self.max_sprites + 1, self.size, self.size), bool)
        masks[0], masks[1 : count + 1] = ~sprites.any(0), visible
        colours = _COLOURS[rng.integers(len(_COLOURS), size=count)]
        return {"image": np.einsum("MXY,MD->XYD", visible, colours), "masks": masks}

    def _scene(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Whole sprites and what is seen of them, both [count X Y], where later ones lie on top."""
        sprites = np.stack([self._sprite(rng) for _ in range(count)])
        covers = np.logical_or.accumulate(sprites[::-1])[::-1]
        visible = sprites.copy()
        visible[:-1] &= ~covers[1:]
        return sprites, visible

    def _sprite(self, rng: np.random.Generator) -> np.ndarray:
        r = rng.integers(self.size // 8, self.size // 5, endpoint=True)
        centre = rng.integers(r, self.size - r, size=2)
        x, y = np.indices((self.size, self.size)) - centre[:, None, None]
        forms = (
            np.maximum(abs(x), abs(y)) <= r,
            x**2 + y**2 <= r * (r + 1),
            (abs(x) <= r) & (2 * abs(y) <= x + r),
        )
        return forms[rng.integers(len(forms))]


def baselines() -> dict[str, float]:
    """Adjusted Rand index, over the pixels of sprites, of k-means on colours and positions.

    One k-means an image with as many clusters as masks; the mean over the first 100 images of the
    test split at the default options.
    """
    from sklearn import cluster, metrics

    test = Shapes("test")
    position = np.moveaxis(np.indices((test.size, test.size)), 0, -1) / test.size
    scores = []
    for example in (test[i] for i in range(100)):
        truth = example["masks"].argmax(0).ravel()
        features = np.dstack([example["image"], position]).reshape(truth.size, -1)
        kmeans = cluster.KMeans(len(example["masks"]), n_init=4, random_state=0)
        found = kmeans.fit_predict(features)
        scores.append(metrics.adjusted_rand_score(truth[truth > 0], found[truth > 0]))
    return {"kmeans_ari": statistics.fmean(scores)}


SPEC = registry.Task(fn=Shapes, kind="objects", baselines=baselines)
