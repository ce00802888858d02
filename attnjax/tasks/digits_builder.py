"""The handwritten digits of scikit-learn as a TFDS data set, prepared without TensorFlow."""

import contextlib
import dataclasses
import os
import pathlib
import sys
import tempfile

import numpy as np
import tensorflow_datasets as tfds
from sklearn import datasets, model_selection


@dataclasses.dataclass(eq=False)
class DigitsConfig(tfds.core.BuilderConfig):
    """Which division into train and test: the seed given to scikit-learn."""

    seed: int = 0


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 images of 8 x 8 pixels in ten classes, divided 80/20 with every class in proportion."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # TFDS 4.9 looks for it with a package that it forgets to require

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.float32),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of scikit-learn, pixels scaled from 0..16 to 0..1.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager):
        digits = datasets.load_digits()
        images = (digits.images / 16).astype(np.float32)[..., None]
        train_images, test_images, train_labels, test_labels = model_selection.train_test_split(
            images,
            digits.target,
            test_size=0.2,
            stratify=digits.target,
            random_state=self.builder_config.seed,
        )
        return {
            "train": self._generate_examples(train_images, train_labels),
            "test": self._generate_examples(test_images, test_labels),
        }

    def _generate_examples(self, images, labels):
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": image, "label": label}


def prepare(root: pathlib.Path, *, seed: int) -> pathlib.Path:
    """The folder of the prepared data set under `root`, written there if it is not yet.

    It is written elsewhere and moved into place whole, so that a reader never meets half of it
    and of several writers at once one wins.
    """
    config = DigitsConfig(name=f"seed{seed}", seed=seed)
    target = root / "digits" / config.name / str(Digits.VERSION)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="digits.incomplete.") as scratch:
        builder = Digits(config=config, data_dir=scratch, file_format="array_record")
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for a program's own results
            builder.download_and_prepare()
        try:
            os.rename(builder.data_dir, target)
        except OSError:
            if not target.exists():
                raise
    return target
