"""What a checkpoint may hold and what it may be restored to, leaf by leaf."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from attnjax.zoo import digest


def to_save(state: PyTree) -> dict[str, Any]:
    """The leaves of `state` by path; ValueError for one that is empty, NaN, infinite or no array.

    A state that isn't finite would be restored again and again: there is no use in keeping it.
    """
    leaves = digest.named_leaves(state)
    for name, leaf in leaves.items():
        if leaf.size == 0:
            raise ValueError(f"{name} must not be empty to be saved, {leaf.shape=}")
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not _is_finite(leaf):
            raise ValueError(f"{name} must be finite to be saved")
    return leaves


def to_restore(
    target: PyTree, saved: Mapping[str, Mapping], *, path: os.PathLike | str
) -> dict[str, Any]:
    """The leaves of `target` by path, each as orbax needs it: numpy, or a shape with a sharding.

    Raises ValueError unless they have the names, shapes and dtypes in `saved`, the digests of what
    is stored in `path`: orbax itself would restore float32 as int8, all zeros, without a word.
    """
    leaves = digest.named_leaves(target)
    if leaves.keys() != saved.keys():
        missing, unknown = (
            sorted(saved.keys() - leaves.keys()),
            sorted(leaves.keys() - saved.keys()),
        )
        raise ValueError(f"target must have the leaves saved in {path}: {missing=}, {unknown=}")
    for name, leaf in leaves.items():
        for field, wanted in (("shape", list(leaf.shape)), ("dtype", str(leaf.dtype))):
            if wanted != saved[name][field]:
                was = saved[name][field]
                raise ValueError(
                    f"target {name} must have {field} {was} as in {path}, has {wanted}"
                )
    return {name: _placed(leaf) for name, leaf in leaves.items()}


def _is_finite(leaf: jax.Array | np.ndarray) -> bool:
    isfinite = np.isfinite if isinstance(leaf, np.ndarray) else jnp.isfinite  # jnp narrows float64
    return bool(isfinite(leaf).all())


def _placed(leaf: Any) -> np.ndarray | jax.ShapeDtypeStruct:
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
