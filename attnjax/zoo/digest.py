"""What each leaf of a tree is, bit for bit: SHA-256, shape and dtype under the leaf's path.

Array files carry no checksum of their data: orbax and safetensors both read a flipped bit back as
another number and say nothing. So whatever is stored here is stored with its digests, and verified
against them after reading.
"""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree


class CheckpointCorrupted(Exception):
    """What `path` holds is not what was saved; `leaf` is the part, where one can be named."""

    def __init__(self, path: os.PathLike | str, leaf: str | None, detail: str):
        self.path, self.leaf, self.detail = path, leaf, detail
        super().__init__(f"{path}: {self.reason}")

    @property
    def reason(self) -> str:
        """What is wrong, without the path."""
        return self.detail if self.leaf is None else f"{self.leaf} {self.detail}"


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of `tree` by path, as in "params/layer_0/kernel".

    Raises ValueError for a leaf that isn't an array and for two paths that read the same.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name or name in leaves:
            raise ValueError(f"{name!r} must be the path of exactly one leaf")
        if not _is_array(leaf):
            raise ValueError(f"{name} must be an array of numbers, not {type(leaf).__name__}")
        leaves[name] = leaf
    return leaves


def digests(tree: PyTree) -> dict[str, dict[str, Any]]:
    """`{path: {"sha256": ..., "shape": [...], "dtype": ...}}` of every leaf; JSON as it stands.

    The bytes are those of the whole array in C order, so the mesh that holds it makes no
    difference. Of a typed PRNG key they are its key data. Where no process holds a whole array,
    every process must call this at the same time: the array is gathered.
    """
    return {name: _digest(leaf) for name, leaf in named_leaves(tree).items()}


def verify(tree: PyTree, expected: Mapping[str, Mapping], *, path: os.PathLike | str) -> None:
    """Raises CheckpointCorrupted, naming `path` and the leaf, unless `tree` has these digests."""
    actual = digests(tree)
    for name in sorted(actual.keys() | expected.keys()):
        if name not in actual:
            raise CheckpointCorrupted(path, name, "is missing")
        if name not in expected:
            raise CheckpointCorrupted(path, name, "is there but was never saved")
        for field, value in actual[name].items():
            if value != expected[name][field]:
                detail = f"has {field} {value}, was saved with {expected[name][field]}"
                raise CheckpointCorrupted(path, name, detail)


def _is_array(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return False
    kinds = (np.number, np.bool_, jax.dtypes.prng_key)
    native = getattr(leaf.dtype, "isnative", True)  # the dtype of a key has no byte order
    return native and any(jnp.issubdtype(leaf.dtype, kind) for kind in kinds)


def _digest(leaf: Any) -> dict[str, Any]:
    data = np.ascontiguousarray(_on_host(leaf)).reshape(-1).view(np.uint8)
    sha256 = hashlib.sha256(data).hexdigest()
    return {"sha256": sha256, "shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _on_host(leaf: Any) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
