import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import parallel
from attnjax.core import masks, registry
from attnjax.ops import dot_product_attention as ops
from tests.parallel import helpers

ANY = dataclasses.replace(registry.get("multi_head_attention"), fn=ops.dot_product_attention)
SLOPES = np.float32([0.1, -0.3, 0.5, 1.0])


def test_what_score_mod_captures_has_its_gradient():
    """In tiles, whose backward pass is written by hand; `matrix_test.py` has the other cells."""
    arrays = *helpers.normal((2, 8, 4, 4), (2, 8, 2, 4), (2, 8, 2, 3)), SLOPES
    mesh = helpers.mesh(data=2, context=2)

    def mod(slopes):
        far = lambda t, s: jnp.where(t - s > 2, 2.0, jnp.abs(t - s))
        return lambda x, b, n, t, s: x * (1 + b) - jax.nn.sigmoid(slopes)[n] * far(t, s)

    def run(fn):
        options = dict(mask=masks.Causal(), implementation="blocked")
        of = lambda q, k, v, slopes: fn(q, k, v, score_mod=mod(slopes), **options)
        return jax.device_get(helpers.with_gradients(of)(*arrays))

    expected = run(ANY.fn)
    for strategy in ("gather", "ring"):
        sharded = run(parallel.shard(strategy, ANY, mesh))
        chex.assert_trees_all_close(sharded, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["multi_head_latent_attention", "croc", "illama"])
def test_functions_of_their_own(name):
    record = registry.get(name)
    args = helpers.example(name, 13)
    fn = parallel.shard("gather(order='zigzag')", record, helpers.mesh(context=4))
    mask = masks.Causal()
    actual, expected = (jax.jit(lambda f=f: f(**args, mask=mask))() for f in (fn, record.fn))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("strategy", "options", "error", "message"),
    [
        ("gather", dict(q_offset=3), NotImplementedError, "gather can't honour positions, q_off"),
        ("gather", dict(return_lse=True), NotImplementedError, "gather can't honour positions"),
        ("gather(order='striped')", {}, ValueError, "order='striped' must be 'contiguous' or"),
        ("gather(orde='zigzag')", {}, ValueError, "gather has no option 'orde'; did you mean"),
        ("all_to_all", dict(return_lse=True), NotImplementedError, "all_to_all can't honour re"),
    ],
)
def test_refuses(strategy, options, error, message):
    q, k, v = helpers.normal((1, 8, 4, 4), (1, 8, 2, 4), (1, 8, 2, 3))
    with pytest.raises(error, match=message):
        parallel.shard(strategy, ANY, helpers.mesh(context=4))(q, k, v, **options)
