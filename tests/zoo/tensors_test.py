import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.zoo import digest, tensors

DTYPES = ["bool", "uint8", "uint16", "uint32", "int8", "int16", "int32"]
DTYPES += ["float16", "bfloat16", "float32"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_keeps_every_bit(dtype):
    array = np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype))
    arrays = {"a/b": np.asfortranarray(array), "scalar": array[1, 2], "none": array[:, :0]}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    loaded = tensors.loads(tensors.dumps(arrays), path="file")
    digest.verify(loaded, digest.digests(arrays), path="file")


def test_the_same_arrays_give_the_same_bytes():
    arrays = {"b": np.ones(2, np.float32), "a": np.zeros(3, np.int8)}
    assert tensors.dumps(arrays) == tensors.dumps(dict(reversed(arrays.items())))


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex64", "int4"])
def test_a_dtype_that_would_not_come_back_is_refused(dtype):
    with pytest.raises(ValueError, match="^a has array.dtype=dtype"):
        tensors.dumps({"a": np.ones(1, jnp.dtype(dtype))})


def test_no_truncation_is_read():
    data = tensors.dumps({"a": np.ones(3, np.float32)})
    for length in range(len(data)):
        with pytest.raises(digest.CheckpointCorrupted, match="^file: is no safetensors file: "):
            tensors.loads(data[:length], path="file")


@pytest.mark.parametrize("old, new", [(b"F32", b"F99"), (b"F32", b"F64"), (b"[3]", b"[4]")])
def test_a_wrong_header_is_refused(old, new):
    data = tensors.dumps({"a": np.ones(3, np.float32)})
    with pytest.raises(digest.CheckpointCorrupted, match="^file: is no safetensors file: "):
        tensors.loads(data.replace(old, new), path="file")
