"""A flat dict of arrays to safetensors bytes and back.

`safetensors.flax.load` and `safetensors.numpy.load` know no bfloat16 when they are given bytes, and
reading a file by its path would skip the checks the zoo makes before it reads. So the bytes are
parsed by safetensors and only named here.
"""

import os
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from attnjax.zoo import digest

# No 64-bit types: jax would narrow them in silence where they are loaded.
_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F32": np.float32,
}
_STORED = frozenset(np.dtype(dtype) for dtype in _DTYPES.values())


def dumps(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of `arrays`; the same arrays give the same bytes.

    Raises ValueError, naming the array, for a dtype that `loads` would not give back.
    """
    for name, array in arrays.items():
        if array.dtype not in _STORED:
            raise ValueError(
                f"{name} has {array.dtype=}; it must be one of {sorted(map(str, _STORED))}"
            )
    return safetensors.numpy.save({name: np.asarray(arrays[name], order="C") for name in arrays})


def loads(data: bytes, *, path: os.PathLike | str) -> dict[str, np.ndarray]:
    """The arrays in `data`; CheckpointCorrupted, naming `path`, where there are none to be had."""
    try:
        tensors = safetensors.deserialize(data)
        return {name: _array(tensor) for name, tensor in tensors}
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise digest.CheckpointCorrupted(path, None, f"is no safetensors file: {error}") from None


def _array(tensor: Mapping) -> np.ndarray:
    return np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
