import functools

import jax
import jax.numpy as jnp

from attnjax import parallel
from attnjax.core import masks, registry
from tests.parallel import helpers


def compiled(strategy, record, arrays, size=4):
    mesh = helpers.mesh(context=size)
    run = functools.partial(parallel.shard(strategy, record, mesh), mask=masks.Causal())
    split = jax.NamedSharding(mesh, jax.P(None, "context"))
    loss = lambda arrays: (run(**arrays) ** 2).sum()
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)
    grad = jax.jit(jax.grad(loss), out_shardings=split)
    return grad.lower(jax.tree.map(place, arrays)).compile().as_text()


def test_sequences_are_exchanged_and_nothing_is_gathered():
    q, k, v = helpers.normal((1, 16, 4, 8), (1, 16, 2, 8), (1, 16, 2, 8))
    text = compiled("all_to_all", registry.get("gqa"), dict(q=q, k=k, v=v))
    assert "all-to-all" in text and "all-gather" not in text and "permute" not in text


def test_runs_exchange_and_rings_send():
    q, k, v = helpers.normal((1, 16, 4, 8), (1, 16, 2, 8), (1, 16, 2, 8))
    text = compiled("all_to_all_ring(heads=2)", registry.get("gqa"), dict(q=q, k=k, v=v))
    assert "all-to-all" in text and "collective-permute" in text and "all-gather" not in text


def test_learned_arrays_of_the_heads_have_gradients():
    record = registry.get("hedgehog")
    args = list(helpers.example("hedgehog", 13).values())
    axes = dict(data=2, context=2)
    helpers.assert_same("all_to_all", record, args, axes, mask=masks.Causal())


def test_as_many_devices_as_heads_allow_are_a_run():
    arrays = helpers.normal((1, 9, 6, 4), (1, 9, 3, 4), (1, 9, 3, 4))
    helpers.assert_same("all_to_all_ring", registry.get("gqa"), arrays, dict(context=4))


def test_a_state_of_all_heads_comes_out_of_any_length():
    record = registry.get("delta_net")
    args = helpers.example("delta_net", 7)
    fn = parallel.shard("all_to_all", record, helpers.mesh(context=2, tensor=2))
    run = lambda fn: jax.jit(lambda: fn(**args, mask=masks.Causal(), return_state=True))()
    for actual, expected in zip(run(fn), run(record.fn), strict=True):
        assert jnp.allclose(actual, expected, rtol=1e-5, atol=1e-6) and expected.any()
