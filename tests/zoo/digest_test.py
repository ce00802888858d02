import collections
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.zoo import digest

Pair = collections.namedtuple("Pair", ["left", "right"])
W = np.arange(8, dtype=np.float32).reshape(4, 2)
TREE = {"pair": Pair(jnp.asarray(W), [W.astype(jnp.bfloat16)]), "key": jax.random.key(3)}


def _sha256(array) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def test_digests_name_each_leaf_by_path_and_hash_its_bytes():
    half, key = W.astype(jnp.bfloat16), np.asarray(jax.random.key_data(TREE["key"]))
    assert digest.digests(TREE) == {
        "key": {"sha256": _sha256(key), "shape": [], "dtype": "key<fry>"},
        "pair/left": {"sha256": _sha256(W), "shape": [4, 2], "dtype": "float32"},
        "pair/right/0": {"sha256": _sha256(half), "shape": [4, 2], "dtype": "bfloat16"},
    }


def test_neither_memory_order_nor_host_nor_mesh_makes_a_difference():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(W, NamedSharding(mesh, P("x")))
    versions = [W, np.asfortranarray(W), jnp.asarray(W), sharded]
    assert len({digest.digests([version])["0"]["sha256"] for version in versions}) == 1


def test_narrow_empty_and_scalar_arrays_have_digests():
    tree = [jnp.zeros((0, 3)), jnp.arange(3).astype(jnp.int4), np.array(True), np.array(1j)]
    assert [leaf["shape"] for leaf in digest.digests(tree).values()] == [[0, 3], [3], [], []]


def test_verify_accepts_what_was_digested():
    digest.verify(TREE, digest.digests(TREE), path="file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": jax.random.key(4)}, r"^file: key has sha256 \w{64}, was saved with \w{64}$"),
        ({"key": jax.random.key(3, impl="rbg")}, "key has .*"),
        ({"pair": Pair(jnp.asarray(W).T, [])}, "^file: pair/left has .*"),
        ({"pair": Pair(TREE["pair"].left, [])}, "^file: pair/right/0 is missing$"),
        ({"more": np.ones(2)}, "^file: more is there but was never saved$"),
    ],
)
def test_verify_names_what_differs(change, message):
    with pytest.raises(digest.CheckpointCorrupted, match=message) as caught:
        digest.verify(TREE | change, digest.digests(TREE), path="file")
    assert caught.value.path == "file" and caught.value.leaf in message


def test_equal_bytes_of_another_shape_or_dtype_differ():
    expected = digest.digests([W])
    for other in (W.reshape(2, 4), W.view(np.int32)):
        with pytest.raises(digest.CheckpointCorrupted, match="^file: 0 has (shape|dtype)"):
            digest.verify([other], expected, path="file")


@pytest.mark.parametrize("leaf", [3, "text", np.array(["text"]), np.array([None]), W.astype(">f4")])
def test_leaves_that_are_no_arrays_of_numbers_are_refused(leaf):
    with pytest.raises(ValueError, match="a must be an array of numbers"):
        digest.digests({"a": leaf})
