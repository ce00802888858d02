import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import models, parallel
from attnjax.core import masks, registry, sharding
from attnjax.parallel import split
from tests import initial
from tests.parallel import helpers

MIXERS = ["gqa(num_kv_heads=2, rotary_base=100.0)", "lightning_attention_2"]


def test_language_model_over_a_mesh():
    options = dict(vocab_size=11, features=16, depth=2, num_heads=4, mixers=MIXERS)
    model = models.create("lm", **options, scan=True, remat="full")
    tokens = np.random.default_rng(0).integers(0, 11, (2, 12), np.int32)
    params = initial.initial(model.init, helpers.KEY, tokens)
    mesh = helpers.mesh(data=2, context=2)

    def loss(model, params, tokens):
        mask = masks.Segments(jnp.cumsum(tokens == 0, 1))
        return jnp.mean(jnp.sin(model.apply(params, tokens, mask=mask)))

    run = lambda model: jax.jit(jax.value_and_grad(functools.partial(loss, model)))
    shard = functools.partial(parallel.shard, None, mesh=mesh)
    placed = jax.device_put(tokens, jax.NamedSharding(mesh, sharding.BATCH))
    actual = run(model.clone(parallel=shard))(params, placed)
    chex.assert_trees_all_close(actual, run(model)(params, tokens), rtol=1e-5, atol=1e-6)


def test_vision_transformer_over_a_mesh():
    mixers = ["swin(window=2, shift=1)", "multi_head_attention"]  # of a grid, of a sequence
    options = dict(image_size=[8, 8], channels=1, num_classes=3, patch=2, mixers=mixers)
    model = models.create("vit", features=8, depth=2, num_heads=2, **options)
    (image,) = helpers.normal((2, 8, 8, 1))
    params = initial.initial(model.init, helpers.KEY, image)
    shard = functools.partial(parallel.shard, None, mesh=helpers.mesh(data=2, context=2))
    loss = lambda model, params: jnp.mean(jnp.sin(model.apply(params, image)))
    run = lambda model: jax.jit(jax.value_and_grad(functools.partial(loss, model)))(params)
    chex.assert_trees_all_close(run(model.clone(parallel=shard)), run(model), rtol=1e-5, atol=1e-6)


def test_every_strategy_that_a_record_names_exists_and_is_tested():
    """A claim has a test in tests/conformance_test.py, which runs each strategy of the record."""
    for name, record in registry.of_kind(registry.Mechanism).items():
        assert bool(record.context) == (registry.Claim.CONTEXT_PARALLEL in record.claims), name
        for strategy in parallel.strategies(record):
            module = importlib.import_module(f"attnjax.parallel.{strategy}")
            assert isinstance(module.STRATEGY, split.Strategy)


def test_none_is_the_first_strategy():
    mesh, record = helpers.mesh(context=4), registry.get("gqa")
    arrays = helpers.example("gqa", 8)
    text = jax.jit(parallel.shard(None, record, mesh)).lower(**arrays).as_text()
    assert "collective_permute" in text


def test_keeps_the_name_and_signature():
    fn = registry.get("gqa").fn
    assert parallel.shard(None, registry.get("gqa"), helpers.mesh(context=4)).__name__ == "gqa"
    assert parallel.shard(None, registry.get("gqa"), helpers.mesh(context=4)).__wrapped__ is fn


@pytest.mark.parametrize(
    ("strategy", "name", "axis", "message"),
    [
        (
            None,
            "biformer",
            "context",
            "biformer has no strategy of context parallelism; higher_order",
        ),
        ("pass_state", "gqa", "context", "strategy='pass_state' must be one of gqa's: ring"),
        ("ring", "gqa", "sequence", "axis='sequence' must be one of the mesh's data, fsdp"),
    ],
)
def test_refuses(strategy, name, axis, message):
    with pytest.raises(ValueError, match=message):
        parallel.shard(strategy, registry.get(name), helpers.mesh(context=4), axis=axis)
