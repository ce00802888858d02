import numpy as np
import pytest

from attnjax.tasks import shapes


@pytest.mark.parametrize("size", [16, 24])
def test_masks_part_the_image_and_have_one_colour_each(size):
    task = shapes.Shapes("train", size=size, min_sprites=1, max_sprites=4)
    counts = set()
    for example in (task[i] for i in range(100)):
        image, masks = example["image"], example["masks"]
        assert image.shape == (size, size, 3) and image.dtype == np.float32
        assert masks.shape == (5, size, size) and masks.dtype == bool
        np.testing.assert_array_equal(masks.sum(0), 1)
        np.testing.assert_array_equal(masks[0], image.sum(-1) == 0)
        count = np.count_nonzero(masks[1:].any((1, 2)))
        assert masks[1 : count + 1].any((1, 2)).all()
        for mask in masks[1 : count + 1]:
            (colour,) = np.unique(image[mask], axis=0)
            assert sorted(colour) == [0, 0, 1]
        counts.add(count)
    assert counts == {1, 2, 3, 4}


def test_no_sprite_is_hidden():
    """The smallest form is a triangle of radius 2 with 13 pixels, of which at least half show."""
    task = shapes.Shapes("train", size=16, min_sprites=6, max_sprites=6)
    visible = np.stack([task[i]["masks"][1:].sum((1, 2)) for i in range(60)])
    assert visible.min() >= 7


def test_sprites_of_one_colour_occur_and_forms_differ():
    task = shapes.Shapes("train", min_sprites=1, max_sprites=1)
    outlines = set()
    for mask in (task[i]["masks"][1] for i in range(200)):
        x, y = np.nonzero(mask)
        outlines.add(mask[x.min() : x.max() + 1, y.min() : y.max() + 1].tobytes())
    assert len(outlines) == 6  # three forms with radius 3 and 4
    pairs = shapes.Shapes("train", min_sprites=2, max_sprites=2)
    colours = [len(np.unique(pairs[i]["image"].reshape(-1, 3), axis=0)) - 1 for i in range(300)]
    assert np.isclose(np.mean(np.array(colours) == 1), 1 / 3, atol=0.1)


@pytest.mark.parametrize("options", [{"size": 15}, {"min_sprites": 4}, {"max_sprites": 7}])
def test_impossible_options(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}={options[name]}.* must be"):
        shapes.Shapes("train", **options)


def test_kmeans_leaves_room():
    assert 0.5 < shapes.baselines()["kmeans_ari"] < 0.7
