import numpy as np
import pytest
import tensorflow_datasets as tfds

from attnjax.tasks import tfds_images


class Dots(tfds.core.GeneratorBasedBuilder):
    """Three images, each with one white pixel; the label says which."""

    VERSION = tfds.core.Version("1.2.0")
    code_path = None
    shape = (2, 2, 1)
    label = tfds.features.ClassLabel(num_classes=4)

    def _info(self):
        image = tfds.features.Tensor(shape=self.shape, dtype=np.uint8, encoding="zlib")
        features = {"image": image} | ({"label": self.label} if self.label else {})
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(3), "test": self._generate_examples(1)}

    def _generate_examples(self, n):
        for i in range(n):
            image = (255 * (np.arange(4) == i)).astype(np.uint8).reshape(2, 2, 1)
            yield i, {"image": image} | ({"label": i} if self.label else {})


class Ragged(Dots):
    shape = (None, None, 1)


class Unlabelled(Dots):
    label = None


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    for builder in (Dots, Ragged, Unlabelled):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_a_prepared_data_set(prepared):
    train = tfds_images.tfds_images("train", name="dots", data_dir=prepared)
    assert repr(train) == "Images(split='train', name='dots/1.2.0', num_classes=4)"
    assert len(train) == 3
    for example in train:
        assert example["image"].dtype == np.float32 and example["image"].shape == (2, 2, 1)
        assert example["image"].sum() == 1
        assert example["image"].ravel()[example["label"]] == 1


def test_splits_of_tfds_and_the_fingerprint(prepared):
    splits = ("train", "train[:2]", "train[1:]", "test")
    sources = [tfds_images.tfds_images(s, name="dots", data_dir=prepared) for s in splits]
    assert [len(images) for images in sources] == [3, 2, 2, 1]
    assert len({images.fingerprint() for images in sources}) == 4


def test_what_is_not_prepared_says_how(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        tfds_images.tfds_images("train", name="cifar10", data_dir=str(tmp_path))
    message = str(error.value)
    assert "'cifar10' is not prepared in" in message and "attnjax[tfds]" in message
    _, _, command = message.partition(' -c "')
    code = command.removesuffix('"').replace("download_and_prepare()", "info")
    scope = {}
    exec(code.replace("; ", "; found = ", 1), scope)  # the advice is valid code
    assert scope["found"].name == "cifar10"


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("no_such_set", "train", "name='no_such_set' must be a data set of TFDS"),
        ("dots", "dev", "dev"),
        ("ragged", "train", "name='ragged' must have a label and images of one size"),
        ("unlabelled", "train", "name='unlabelled' must have a label and images of one size"),
    ],
)
def test_wrong_arguments(prepared, name, split, message):
    with pytest.raises(ValueError, match=message):
        tfds_images.tfds_images(split, name=name, data_dir=prepared)


def test_mnist_as_tfds_describes_it():
    with tfds.testing.mock_data(num_examples=5, policy=tfds.testing.MockPolicy.USE_CODE):
        images = tfds_images.tfds_images("train", name="mnist")
        example = images[0]
    assert len(images) == 5 and images.num_classes == 10
    assert example["image"].shape == (28, 28, 1)
    assert example["image"].min() >= 0 and 0.1 < example["image"].max() <= 1
