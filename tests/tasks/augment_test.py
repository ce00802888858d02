import numpy as np
import pytest

from attnjax.tasks import augment

ALL = (augment.Shift(), augment.Affine(), augment.Elastic(), augment.Cutout())
STILL = (
    augment.Shift(pixels=0),
    augment.Affine(rotation=0.0, scale=0.0, shear=0.0),
    augment.Elastic(pixels=0.0),
    augment.Cutout(size=0),
)


def element(seed=0, shape=(8, 10, 2)):
    image = np.random.default_rng(seed).uniform(size=shape).astype(np.float32)
    return {"image": image, "label": np.int32(3)}


def changed(transform, x, seed=0):
    return transform.random_map(x, np.random.default_rng(seed))


@pytest.mark.parametrize("transform", ALL)
def test_changes_the_image_only_and_by_its_generator_only(transform):
    x = element()
    before = x["image"].copy()
    once, again, other = (changed(transform, x, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(x["image"], before)
    np.testing.assert_array_equal(once["image"], again["image"])
    assert not np.array_equal(once["image"], other["image"])
    assert once["image"].shape == before.shape and once["image"].dtype == np.float32
    assert once["image"].min() >= 0 and once["image"].max() <= 1
    assert once["label"] is x["label"]


@pytest.mark.parametrize("transform", STILL)
def test_strength_zero_is_the_identity(transform):
    x = element()
    np.testing.assert_allclose(changed(transform, x)["image"], x["image"], atol=1e-6)


@pytest.mark.parametrize("transform", ALL)
def test_repr_tells_the_options(transform):
    assert eval(repr(transform), vars(augment)) == transform


def test_shift_reaches_every_neighbour_and_no_further():
    x = {"image": np.zeros((5, 5, 1), np.float32)}
    x["image"][2, 2] = 1
    found = {tuple(np.argwhere(changed(augment.Shift(), x, i)["image"])[0][:2]) for i in range(100)}
    assert found == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)}


class Fixed(np.random.Generator):
    """Draws the given numbers, so that a test knows the transform exactly."""

    def __init__(self, *draws):
        super().__init__(np.random.PCG64(0))
        self.draws = np.array(draws, float)

    def uniform(self, low, high, size):
        assert (low, high, size) == (-1, 1, len(self.draws))
        return self.draws


def test_affine_turns_about_the_centre():
    x = element(shape=(7, 7, 2))
    turned = augment.Affine(rotation=90.0).random_map(x, Fixed(1, 0, 0, 0))["image"]
    np.testing.assert_allclose(turned, np.rot90(x["image"], k=-1), atol=1e-6)


def test_affine_scales_and_shears():
    """On a ramp along X, a factor f gives 3 + f (x - 3) and a shear s gives 3 + s (y - 3)."""
    x = {"image": np.tile(np.arange(7, dtype=np.float32)[:, None, None], (1, 7, 1))}
    scaled = augment.Affine(scale=0.5).random_map(x, Fixed(0, 0, -1, 0))["image"]
    np.testing.assert_allclose(scaled[:, 3, 0], 3 + 0.5 * (np.arange(7) - 3), atol=1e-6)
    sheared = augment.Affine(shear=0.5).random_map(x, Fixed(0, 1, 0, 0))["image"]
    np.testing.assert_allclose(sheared[3, :, 0], 3 + 0.5 * (np.arange(7) - 3), atol=1e-6)


def test_elastic_moves_by_its_root_mean_square():
    """On a ramp the change of value is the displacement along it; borders aside."""
    ramp = np.broadcast_to(np.arange(64, dtype=np.float32)[:, None, None], (64, 64, 1))
    x = {"image": ramp}
    moves = [
        (changed(augment.Elastic(pixels=0.5), x, i)["image"] - ramp)[4:-4, 4:-4] for i in range(20)
    ]
    assert np.isclose(np.sqrt(np.mean(np.square(moves))), 0.5, rtol=0.1)


def test_cutout_blackens_a_square():
    x = {"image": np.ones((6, 6, 1), np.float32)}
    sizes = {int((changed(augment.Cutout(size=3), x, i)["image"] == 0).sum()) for i in range(200)}
    assert sizes == {4, 6, 9}  # in a corner, at a border, inside
