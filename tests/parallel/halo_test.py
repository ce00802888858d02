import dataclasses
import functools

import jax
import numpy as np
import pytest

from attnjax import parallel
from attnjax.core import masks, registry
from attnjax.ops import dot_product_attention as ops
from attnjax.parallel import slab
from tests.parallel import helpers, traffic

ANY = dataclasses.replace(registry.get("multi_head_attention"), fn=ops.dot_product_attention)


def sent(record, arrays, **options):
    run = functools.partial(parallel.shard("halo", record, helpers.mesh(context=4)), **options)
    return traffic.sent(run, arrays)


@pytest.mark.parametrize(
    ("mask", "rows"),
    [
        (masks.Window(3), 3 * 3),  # three devices get the 3 keys before their own
        (masks.Window(3, 2), 3 * 3 + 3 * 2),
        (masks.Window(5), 3 * 4 + 2 * 1),  # of the second neighbour one more
        (masks.Causal(), 4 * (1 + 2 + 3)),
        (None, 4 * 3 * 4),
    ],
    ids=str,
)
def test_only_keys_that_are_seen_are_sent(mask, rows):
    q, k, v = helpers.normal((1, 16, 2, 8), (1, 16, 2, 8), (1, 16, 2, 6))
    assert sent(ANY, dict(q=q, k=k, v=v), mask=mask) == rows * 2 * (8 + 6)


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        # the second device sees 2 of the first, its own 4 and 2 of the third; at a border nothing
        # but a window that is moved inward
        ("gna", dict(window=5), 3 * 2 + 3 * 2),
        ("gna", dict(window=4, stride=4), 0),  # windows end where devices do
        ("gna", dict(window=3, causal=(True, False)), 3 * 2),
        ("swin", dict(window=4), 0),
        ("swin", dict(window=4, shift=2), 3 * (2 + 2)),
    ],
    ids=str,
)
def test_only_rows_that_are_seen_are_sent(name, options, rows):
    arrays = dict(zip("qkv", helpers.normal(*[(1, 16, 5, 2, 4)] * 3), strict=True))
    if name == "swin":
        arrays["bias"] = helpers.normal((1, 2, 16, 16))[0]
    assert sent(registry.get(name), arrays, **options) == rows * 5 * 2 * 3 * 4


def test_a_slab_is_aligned_and_reaches_inward_at_borders():
    need = [(0, 5), (3, 9), (7, 13), (11, 14)]
    part = slab.Slab.of(np.array(need), 14, align=3)
    assert all(start % 3 == 0 for start in part.start)
    assert part.start[0] == 0 and part.start[-1] + part.length == 14
    for start, (low, high) in zip(part.start, need, strict=True):
        assert start <= low and high <= start + part.length


def test_refuses_what_it_cannot_read():
    record = dataclasses.replace(registry.get("mamba"), context=("halo",))
    fn = parallel.shard("halo", record, helpers.mesh(context=4))
    with pytest.raises(NotImplementedError, match="halo can't tell what mamba"):
        jax.eval_shape(fn, **helpers.example("mamba", 8))
