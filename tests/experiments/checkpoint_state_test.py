import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from attnjax.zoo import digest
from experiments import checkpoint_state

STATE = {"params": {"w": jnp.ones((2, 3))}, "key": jax.random.key(0), "host": np.arange(3)}
BAD = {
    "w must be finite": {"w": jnp.array([1.0, jnp.nan])},
    "half must be finite": {"half": jnp.array([jnp.inf], jnp.bfloat16)},
    "host must be finite": {"host": np.array([-np.inf])},
    "none must not be empty": {"none": jnp.zeros((0, 3))},
    "count must be an array of numbers, not int": {"count": 3},
    "text must be an array of numbers": {"text": np.array(["a"])},
    "'a/b' must be the path of exactly one leaf": {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)},
    "'' must be the path": jnp.ones(3),
}


def _to_restore(change):
    saved = digest.digests(STATE)
    return checkpoint_state.to_restore(STATE | change, saved, path="run/3")


@pytest.mark.parametrize("message", BAD)
def test_a_state_that_should_not_be_kept_is_refused(message):
    with pytest.raises(ValueError, match=message):
        checkpoint_state.to_save(BAD[message])


def test_leaves_to_save_are_named_and_as_they_were():
    leaves = checkpoint_state.to_save(STATE)
    assert leaves == {"params/w": STATE["params"]["w"]} | {n: STATE[n] for n in ("key", "host")}


def test_large_float64_on_the_host_is_finite():
    checkpoint_state.to_save({"host": np.array([1e300])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": jax.ShapeDtypeStruct((2,), jnp.uint32)}, r"key must have shape \[\] as in run/3"),
        ({"key": jax.random.key(0, impl="rbg")}, "key must have dtype key<fry> .* has key<rbg>"),
        ({"host": np.zeros(3, np.int8)}, "target host must have dtype int64 .* has int8"),
        ({"host": np.zeros(4, np.int64)}, r"target host must have shape \[3\] .* has \[4\]"),
        ({"extra": np.zeros(1)}, r"missing=\[\], unknown=\['extra'\]"),
        ({"params": {}}, r"missing=\['params/w'\], unknown=\[\]"),
    ],
)
def test_a_target_of_another_form_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        _to_restore(change)


def test_each_leaf_goes_where_its_target_is():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, P("x"))
    nowhere = jax.eval_shape(lambda: STATE["key"])
    w = jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=sharding)
    leaves = _to_restore({"params": {"w": w}, "key": nowhere})
    assert leaves["params/w"].sharding == sharding
    assert leaves["key"].sharding == SingleDeviceSharding(jax.devices()[0])
    assert isinstance(leaves["host"], np.ndarray)
