"""Any TFDS data set of labelled images (mnist, cifar10, ...), read without TensorFlow.

Nothing is downloaded here: a data set is prepared once by TFDS itself, as array_record files,
and the error for one that is not prepared says how.
"""

from attnjax.core import registry
from attnjax.tasks import source


def tfds_images(split: str, *, name: str = "mnist", data_dir: str | None = None) -> source.Images:
    """{"image": float32 [X Y D] in [0, 1], "label": int32} of the TFDS data set `name`.

    `split` is any that TFDS understands, such as "train" or "train[:90%]"; `data_dir` is where
    data sets are prepared, by default TFDS's own folder.

    Raises FileNotFoundError where the data set is not prepared, and ValueError where TFDS knows
    no such data set or split, or the images have no label or no common size.
    """
    import tensorflow_datasets as tfds  # comes with an extra

    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise ValueError(
            f"{name=} must be a data set of TFDS, or prepared in {data_dir=}"
        ) from None
    features = builder.info.features
    if not {"image", "label"} <= set(features) or None in features["image"].shape:
        raise ValueError(f"{name=} must have a label and images of one size, has {features}")
    try:
        records = builder.as_data_source(split=split)
    except KeyError as error:
        raise FileNotFoundError(
            f"{name!r} is not prepared in {builder.data_dir}. Once, with attnjax[tfds] installed: "
            f'python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, {data_dir=}, '
            "file_format='array_record').download_and_prepare()\""
        ) from error
    num_classes = features["label"].num_classes
    return source.Images(
        split, name=builder.info.full_name, num_classes=num_classes, records=records
    )


SPEC = registry.Task(fn=tfds_images, kind="image")
