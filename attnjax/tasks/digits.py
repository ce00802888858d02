"""Handwritten digits: scikit-learn's 1,797 images of 8 x 8 pixels, as a prepared TFDS data set.

They come with scikit-learn, so nothing is downloaded; they are prepared on first use (see
`source.cache_dir`). The split is 80/20 with every class in proportion, 1,437 and 360 images.
From Kaynak (1995), "Optical recognition of handwritten digits", through the UCI repository.
"""

from attnjax.core import registry
from attnjax.tasks import source


def digits(split: str, *, seed: int = 0) -> source.Images:
    """{"image": float32 [8 8 1] in [0, 1], "label": int32}; `split` is train or test.

    `seed` says which images go to which split; published numbers are of seed 0. Raises
    ValueError for another split.
    """
    # These libraries come with an extra and take seconds to import.
    import tensorflow_datasets as tfds

    from attnjax.tasks import digits_builder

    source.check_split(split, ("train", "test"))
    builder = tfds.builder_from_directory(digits_builder.prepare(source.cache_dir(), seed=seed))
    name = builder.info.full_name
    records = builder.as_data_source(split=split)
    return source.Images(split, name=name, num_classes=10, records=records)


def baselines() -> dict[str, float]:
    """Test accuracy, at seed 0, of three classifiers on the 64 pixels."""
    import numpy as np
    from sklearn import linear_model, neighbors, svm

    def arrays(split):
        examples = list(digits(split))
        images = np.stack([example["image"].ravel() for example in examples])
        return images, np.stack([example["label"] for example in examples])

    train, test = arrays("train"), arrays("test")
    models = {
        "svc": svm.SVC(gamma=0.001 * 16**2),  # 0.001 for pixels in 0..16
        "nearest_3": neighbors.KNeighborsClassifier(3),
        "logistic_regression": linear_model.LogisticRegression(max_iter=5000),
    }
    return {name: float(model.fit(*train).score(*test)) for name, model in models.items()}


SPEC = registry.Task(fn=digits, kind="image", baselines=baselines)
