import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest

from attnjax import parallel
from attnjax.core import masks, registry
from tests.parallel import helpers, traffic

MOBA = registry.get("moba")


def qkv(T=16):
    return helpers.normal((2, T, 4, 8), (2, T, 2, 8), (2, T, 2, 6))


def test_keys_go_once_around_and_only_means_are_gathered():
    q, k, v = qkv()
    ring = parallel.shard("block_ring", MOBA, helpers.mesh(context=4))
    run = functools.partial(ring, block=2, topk=3)
    assert traffic.sent(run, dict(q=q, k=k, v=v)) == 3 * (k.size + v.size)
    gathered = [eqn for eqn in equations(jax.make_jaxpr(run)(q, k, v)) if "all_gather" in eqn]
    assert [shape for *_, shape in gathered] == [(2, 8, 2, 8)]


def equations(closed):
    """(primitive, shape of its output) of all, inner ones too."""
    is_jaxpr = lambda x: hasattr(x, "eqns")
    for eqn in closed.eqns:
        yield eqn.primitive.name, eqn.outvars[0].aval.shape if eqn.outvars else ()
        for inner in filter(is_jaxpr, jax.tree.leaves(eqn.params, is_leaf=is_jaxpr)):
            yield from equations(inner)


def test_what_nobody_chose_is_not_read():
    """All queries like block 0; values of block 3 are not numbers."""
    q, k, v = map(np.array, qkv())
    q, k[:, :2], k[:, 2:] = abs(q), 5.0, -abs(k[:, 2:])
    broken = v.copy()
    broken[:, 6:8] = np.nan
    ring = parallel.shard("block_ring", MOBA, helpers.mesh(context=2, tensor=2))
    run = lambda fn, v: jax.jit(functools.partial(fn, block=2, topk=2))(q, k, v)
    actual, expected = jax.device_get((run(ring, broken), run(MOBA.fn, v)))
    assert np.isnan(actual[:, 6:8]).any()
    others = [x[:, [*range(6), *range(8, 16)]] for x in (actual, expected)]
    chex.assert_trees_all_close(*others, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("moba", dict(q_offset=2), NotImplementedError, "block_ring can't honour q_offset"),
        ("moba", dict(implementation="xla"), NotImplementedError, "implementation, gather can"),
        ("moba", dict(topk=0), ValueError, "topk=0 must be at least 1"),
        ("moba", dict(mask=masks.Window(2)), NotImplementedError, "can't honour Window"),
        ("gqa", {}, NotImplementedError, "block_ring can't tell which blocks gqa chooses"),
    ],
)
def test_refuses(name, options, error, message):
    record = dataclasses.replace(registry.get(name), context=("block_ring",))
    fn = parallel.shard("block_ring", record, helpers.mesh(context=4))
    with pytest.raises(error, match=message):
        fn(*qkv(), **options)
