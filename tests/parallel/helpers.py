"""A function over several devices against the same function on one."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np

from attnjax import parallel
from attnjax.core import registry, sharding
from tests import cotangents, initial

KEY = jax.random.key(0)


def mesh(**axes):
    """Of as many devices as the axes need."""
    count = functools.reduce(lambda a, b: a * b, axes.values())
    return sharding.make_mesh(devices=jax.devices()[:count], **axes)


MESHES = dict(data=2, context=2), dict(context=2, tensor=2)  # `cells` have one axis


def normal(*shapes, dtype="float32"):
    draw = np.random.default_rng(0).normal  # JAX would compile this for each shape
    return [jnp.asarray(draw(size=shape), dtype) for shape in shapes]


def example(name, T):
    """Arguments of a record's function, by name and in their order, which JAX forgets."""
    record = registry.get(name)
    found = initial.initial(lambda key: record.example(key, T), KEY)
    return {name: found[name] for name in inspect.signature(record.fn).parameters if name in found}


def with_gradients(fn, **options):
    """Outputs and the gradients of all arguments, in one compilation."""

    @jax.jit
    def run(*arrays):
        out, vjp = jax.vjp(lambda *arrays: fn(*arrays, **options), *arrays)
        return out, vjp(cotangents.like(out))

    return run


def assert_same(strategy, record, arrays, *meshes, **options):
    """In outputs and gradients, to the rounding of float32, on meshes of the given axes."""
    arrays = jax.device_get(arrays)  # else JAX compiles how they are cut, for each shape
    expected = jax.device_get(with_gradients(record.fn, **options)(*arrays))
    assert all(x.any() for x in jax.tree.leaves(expected[0])), "nothing is seen"
    for axes in meshes:
        sharded = parallel.shard(strategy, record, mesh(**axes))
        actual = with_gradients(sharded, **options)(*arrays)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def rms(x):
    """In numpy: JAX would compile it for each shape."""
    return float(np.sqrt(np.mean(np.asarray(x, np.float32) ** 2)))
