"""However a step is spread over devices, it is the same step."""

import chex
import jax
import numpy as np
import pytest

from experiments import config as configs
from experiments import learning, placement

SMALL = configs.Experiment(
    task="mqar(vocab_size=32, length=16, num_pairs=2)",
    model="lm(features=16, depth=2, num_heads=4)",
    mixers=("multi_head_attention(rotary_base=10000.0)", "lightning_attention_2"),
    batch_size=8,
    learning_rate=1e-3,
    steps=3,
    warmup_steps=1,
)
MESHES = [
    *(dict(data=4), dict(data=1, fsdp=4), dict(data=1, context=4), dict(data=1, tensor=4)),
    *(dict(data=2, fsdp=2), dict(data=2, context=2), dict(data=2, tensor=2)),
    *(dict(data=1, fsdp=2, context=2), dict(data=1, fsdp=2, tensor=2)),
    dict(data=1, context=2, tensor=2),
]


def batches(config):
    _, source = configs.make_task(config.task, "train")
    for start in range(0, 3 * config.batch_size, config.batch_size):
        examples = [source[start + i] for i in range(config.batch_size)]
        yield {name: np.stack([e[name] for e in examples]) for name in examples[0]}


def run(config, mesh=None):
    """Parameters after three steps, and metrics of each: placed by the config, or on one device."""
    _, source = configs.make_task(config.task, "train")
    example, description = next(batches(config)), learning.model_description(config, source)
    if mesh is None:
        model, optimiser = learning.make_model(description), learning.optimizer(config)
        state = learning.init_state(model, optimiser, example, config.seed)
        update = jax.jit(lambda s, b: learning.update(model, optimiser, s, b))
        put = lambda batch: batch
    else:
        model = learning.make_model(description, parallel=placement.context_parallel(mesh, config))
        placed = placement.place(config, model, example, mesh)
        state, update, put = placed.init(), placed.update, placed.put
    metrics = []
    for batch in batches(config):
        state, measured = update(state, put(batch))
        metrics.append(measured)
    return jax.device_get((state["params"], metrics))


@pytest.fixture(scope="module")
def expected():
    return run(SMALL)


@pytest.mark.parametrize("sizes", MESHES, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()))
def test_every_mesh_reaches_the_same_parameters(expected, sizes):
    config = SMALL.__class__(**vars(SMALL) | dict(mesh=configs.Mesh(**sizes)))
    actual = run(config, placement.make_mesh(config))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_strategy_that_no_mixer_has_is_refused():
    config = SMALL.__class__(**vars(SMALL) | dict(strategy="rink"))
    with pytest.raises(ValueError, match="strategy='rink' must be one of the mixers': all_to_all"):
        placement.context_parallel(placement.make_mesh(config), config)


def test_pmap_reaches_the_same_parameters(expected):
    config = SMALL.__class__(**vars(SMALL) | dict(parallel="pmap"))
    actual = run(config, placement.make_mesh(config))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_accumulation_reaches_the_same_parameters(expected, parallel):
    config = SMALL.__class__(**vars(SMALL) | dict(accumulate=2, parallel=parallel))
    actual = run(config, placement.make_mesh(config))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(batch_size=6), "must be a multiple of 4"),
        (dict(mesh=configs.Mesh(data=3)), "needs 3 devices, there are 4"),
        (dict(mesh=configs.Mesh(context=2), parallel="pmap"), "splits data alone"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        placement.make_mesh(SMALL.__class__(**vars(SMALL) | changes))
