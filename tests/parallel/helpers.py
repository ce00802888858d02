"""A function over several devices against the same function on one."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from attnjax import parallel
from attnjax.core import sharding
from attnjax.parallel import matrix

KEY = jax.random.key(0)


def mesh(**axes):
    """Of as many devices as the axes need."""
    count = functools.reduce(lambda a, b: a * b, axes.values())
    return sharding.make_mesh(devices=jax.devices()[:count], **axes)


MESHES = {
    "context=4": dict(context=4),
    "data=2 context=2": dict(data=2, context=2),
    "context=2 tensor=2": dict(context=2, tensor=2),
}


def normal(*shapes, dtype="float32"):
    keys = jax.random.split(KEY, len(shapes))
    return [jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True)]


def with_gradients(fn, **options):
    """Outputs and the gradients of all arguments, in one compilation."""

    @jax.jit
    def run(*arrays):
        out, vjp = jax.vjp(lambda *arrays: fn(*arrays, **options), *arrays)
        draw = lambda x: jax.random.normal(KEY, x.shape, x.dtype)
        return out, vjp(jax.tree.map(draw, out))

    return run


def assert_same(strategy, record, arrays, *, axes, **options):
    """In outputs and gradients, to the rounding of float32."""
    sharded = parallel.shard(strategy, record, mesh(**axes))
    actual = with_gradients(sharded, **options)(*arrays)
    expected = with_gradients(record.fn, **options)(*arrays)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert all(x.any() for x in jax.tree.leaves(expected[0])), "nothing is seen"


def rms(x):
    return float(jnp.sqrt(jnp.mean(x.astype(jnp.float32) ** 2)))


# row by row, as what is on one device is kept for all strategies
CELLS = [
    (number, strategy, row)
    for number, table in enumerate(matrix.tables())
    for row in table.rows
    for strategy in table.strategies
]


def share(part, parts):
    """The cells of every `parts`-th row, from row `part` on."""
    rows = list(dict.fromkeys((number, row) for number, _, row in CELLS))
    mine = set(rows[part::parts])
    return [cell for cell in CELLS if (cell[0], cell[2]) in mine]


def largest_error(cell, devices):
    """Of outputs and gradients of a cell of the matrix, relative to one device's."""
    number, strategy, row = cell
    table = matrix.tables()[number]
    run = parallel.shard(strategy, table.record, mesh(context=devices))
    arrays, options = matrix.arguments(table.rows[row])
    by_name = lambda *xs: run(**dict(zip(arrays, xs, strict=True)), **options)
    actual = jax.device_get(jax.tree.leaves(with_gradients(by_name)(*arrays.values())))
    # in numpy, as JAX would compile each of these operations for each shape
    error = lambda a, b: float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
    flat = lambda x: x.astype(np.float32).reshape(-1)
    pairs = zip(actual, _on_one(number, row), strict=True)
    return max(error(flat(a), flat(b)) for a, b in pairs)


@functools.cache
def _on_one(number, row):
    table = matrix.tables()[number]
    arrays, options = matrix.arguments(table.rows[row])
    by_name = lambda *xs: table.record.fn(**dict(zip(arrays, xs, strict=True)), **options)
    return jax.device_get(jax.tree.leaves(with_gradients(by_name)(*arrays.values())))
