import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax import parallel
from attnjax.core import masks, registry
from tests import initial
from tests.parallel import helpers

TPLA = registry.get("tpla")


def test_a_row_of_devices_shares_a_slice_and_splits_its_heads():
    args = list(helpers.example("tpla", 7).values())
    axes = dict(context=2, tensor=2)
    helpers.assert_same("latent", TPLA, args, axes, mask=masks.Causal())


def test_outputs_are_summed_and_nothing_else_is_sent():
    """A device has its slice of the cache and the rotated keys."""
    args = helpers.example("tpla", 8)
    mesh = helpers.mesh(context=4)
    places = {name: jax.NamedSharding(mesh, jax.P()) for name in args}
    places["latent"] = jax.NamedSharding(mesh, jax.P(None, None, "context"))
    places |= {name: jax.NamedSharding(mesh, jax.P("context")) for name in ("up", "shares")}
    by_slices = parallel.shard("latent", TPLA, mesh, by_tokens=False)
    run = functools.partial(by_slices, mask=masks.Causal())
    placed = jax.device_put(args, places)
    text = jax.jit(lambda args: run(**args)).lower(placed).compile().as_text()
    assert "all-reduce" in text
    assert not any(word in text for word in ("all-gather", "permute", "all-to-all"))
    here = {name: x.addressable_shards[0].data.size for name, x in placed.items()}
    assert here["latent"] == args["latent"].size // 4 and here["k_rope"] == args["k_rope"].size


def test_a_step_of_decoding():
    module = TPLA.module(**TPLA.small, slices=4)
    x, latent, k_rope = helpers.normal((2, 1, 12), (2, 5, 4, 4), (2, 5, 4))
    params = initial.initial(module.init, helpers.KEY, x)
    state = module.init_state(2, 5)._replace(latent=latent, k_rope=k_rope, length=jnp.int32(3))
    fn = parallel.shard("latent", TPLA, helpers.mesh(context=4))
    step = lambda module: module.apply(params, state, x, method="extend")
    actual, expected = (jax.jit(lambda m=m: step(m))() for m in (module.clone(fn=fn), module))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_refuses_slices_that_do_not_divide():
    args = helpers.example("tpla", 8)
    fn = parallel.shard("latent", TPLA, helpers.mesh(context=3))
    with pytest.raises(NotImplementedError, match="latent can't split J=4 slices over 3 devices"):
        fn(**args)
