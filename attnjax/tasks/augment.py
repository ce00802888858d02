"""Random changes of small images, as transforms of `loading.loader`.

Each changes element["image"] (X Y D) and nothing else, keeps its shape and dtype, and takes its
randomness from the generator that grain hands over, which is a function of (seed, index) alone.
What comes in from outside the image is black (0).
"""

import dataclasses

import grain
import numpy as np
from scipy import ndimage

from attnjax.tasks import source


@dataclasses.dataclass(frozen=True)
class Shift(grain.transforms.RandomMap):
    """Moves by whole pixels, uniformly from -pixels .. pixels along X and along Y."""

    pixels: int = 1

    def random_map(self, element: source.Example, rng: np.random.Generator) -> source.Example:
        x, y = rng.integers(-self.pixels, self.pixels, size=2, endpoint=True)
        return element | {"image": ndimage.shift(element["image"], (x, y, 0), order=0)}


@dataclasses.dataclass(frozen=True)
class Affine(grain.transforms.RandomMap):
    """Turns, scales and shears about the centre, with linear interpolation.

    The angle is uniform within +-`rotation` degrees, the factor along each axis within
    1 +- `scale`, the shear within +-`shear`.
    """

    rotation: float = 10.0
    scale: float = 0.1
    shear: float = 0.1

    def random_map(self, element: source.Example, rng: np.random.Generator) -> source.Example:
        image = element["image"]
        angle, shear, *factors = rng.uniform(-1, 1, size=4)
        angle = np.deg2rad(angle * self.rotation)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        skew = np.array([[1, shear * self.shear], [0, 1]])
        matrix = np.eye(3)  # from output to input coordinates; channels stay
        matrix[:2, :2] = turn @ skew @ np.diag(1 + self.scale * np.array(factors))
        centre = (np.array(image.shape) - 1) / 2
        offset = centre - matrix @ centre
        moved = ndimage.affine_transform(image, matrix, offset, order=1, mode="grid-constant")
        return element | {"image": moved}


@dataclasses.dataclass(frozen=True)
class Elastic(grain.transforms.RandomMap):
    """Bends by a smooth random field of displacements.

    `pixels` is its root mean square along an axis, `smoothness` the deviation, in pixels, of the
    Gaussian that smooths it.

    Simard, Steinkraus and Platt, "Best Practices for Convolutional Neural Networks Applied to
    Visual Document Analysis", 2003.
    """

    pixels: float = 0.3
    smoothness: float = 2.0

    def random_map(self, element: source.Example, rng: np.random.Generator) -> source.Example:
        image = element["image"]
        noise = rng.standard_normal((2, *image.shape[:2]))
        field = ndimage.gaussian_filter(noise, (0, self.smoothness, self.smoothness))
        where = np.indices(image.shape).astype(float)
        where[:2] += (self.pixels * field / np.sqrt(np.mean(field**2)))[..., None]
        moved = ndimage.map_coordinates(image, where, order=1, mode="grid-constant")
        return element | {"image": moved}


@dataclasses.dataclass(frozen=True)
class Cutout(grain.transforms.RandomMap):
    """Blackens a square of `size` pixels around a uniform pixel, as far as it is inside.

    DeVries and Taylor, arXiv:1708.04552.
    """

    size: int = 2

    def random_map(self, element: source.Example, rng: np.random.Generator) -> source.Example:
        image = element["image"].copy()
        x, y = rng.integers(image.shape[:2]) - self.size // 2
        image[max(x, 0) : max(x + self.size, 0), max(y, 0) : max(y + self.size, 0)] = 0
        return element | {"image": image}
