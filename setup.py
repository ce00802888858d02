import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "attnjax/__init__.py").read_text())[1]

# What it takes to import, train and load a mechanism.
BASE = [
    "jax>=0.11.2,<0.13",  # arrays, autodiff, Pallas
    "flax>=0.12",  # the thin Linen modules
    "jaxtyping>=0.3",  # shapes in signatures
    "optax>=0.2.5",  # the zoo and experiments: optimisers and schedules (flax needs it too)
    "orbax-checkpoint>=0.12",  # the zoo and experiments: checkpoints (flax needs it too)
    "safetensors>=0.5",  # the zoo: weights as data, never as pickled code
    "tyro>=1.0",  # the command line, from dataclasses
    "rich>=13.0",  # tables in the terminal (flax needs it too)
]

EXPERIMENTS = [
    "tensorflow-datasets>=4.9.9",  # data sets as builders, prepared without TensorFlow
    "array-record>=0.8",  # the file format that TFDS writes and grain reads
    "grain>=0.2.18",  # shuffling, batching and exact resume of the input
    "matplotlib>=3.9",  # plots
    "scikit-learn>=1.5",  # small data sets, and the baselines that results are held against
    "tensorboardX>=2.6",  # curves in TensorBoard's format, without TensorBoard
]

TEST = [
    "attnjax[experiments]",
    "beartype>=0.22",  # judges jaxtyping's annotations at run time
    "chex>=0.1.91",  # assertions about trees
    "pytest>=8.0",
    "pytest-xdist>=3.6",  # two workers
    "ruff>=0.14",  # `make lint`
    "setuptools>=77",  # a test builds the package
]

setuptools.setup(
    name="attnjax",
    version=VERSION,
    description="Every attention family as a pure JAX function, checked against its paper",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    packages=setuptools.find_packages(include=["attnjax*", "pallas_kernels*", "experiments*"]),
    package_data={
        "attnjax": ["papers.csv"],  # a link to docs/papers.csv; a wheel holds a copy
        "attnjax.zoo": ["checkpoints/**"],
        "pallas_kernels.tables": ["*.json"],  # what is fastest on which device
        "experiments": ["h100.txtpb"],  # what a compiler is told about the device
    },
    install_requires=BASE,
    extras_require={
        "experiments": EXPERIMENTS,
        "test": TEST,
        # to prepare the data sets whose builders call TensorFlow; TFDS needs the other undeclared
        "tfds": ["tensorflow>=2.20", "importlib_resources>=6.0"],
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        # what compiles for TPU and for H100 on a machine without one: libtpu, and the CUDA plugin
        # alone; what it would take to run there is in "cuda"
        "plan": ["jax[tpu]", "jax-cuda13-plugin>=0.11.2,<0.13"],
        "tokamax": ["tokamax>=0.0.17"],  # one more implementation of dot_product_attention
    },
    entry_points={"console_scripts": ["attnjax = attnjax.cli:main"]},
)
