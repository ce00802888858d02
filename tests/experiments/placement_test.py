"""However a step is spread over devices, it is the same step."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from experiments import config as configs
from experiments import learning, placement

SMALL = configs.Experiment(  # of one mechanism: conformance_test.py has meshes for each
    task="mqar(vocab_size=32, length=16, num_pairs=2)",
    model="lm(features=16, depth=1, num_heads=4)",
    mixers=("multi_head_attention(rotary_base=10000.0)",),
    batch_size=8,
    learning_rate=1e-3,
    steps=3,
    warmup_steps=1,
)
MESHES = [  # of four devices: all but data=4, which accumulation is tested with
    *(dict(data=1, fsdp=4), dict(data=1, context=4), dict(data=1, tensor=4)),
    *(dict(data=2, fsdp=2), dict(data=2, context=2), dict(data=2, tensor=2)),
    *(dict(data=1, fsdp=2, context=2), dict(data=1, fsdp=2, tensor=2)),
    dict(data=1, context=2, tensor=2),
]


def batches(config):
    _, source = configs.make_task(config.task, "train")
    for start in range(0, 3 * config.batch_size, config.batch_size):
        examples = [source[start + i] for i in range(config.batch_size)]
        yield {name: np.stack([e[name] for e in examples]) for name in examples[0]}


def described(config):
    _, source = configs.make_task(config.task, "train")
    return learning.model_description(config, source)


def placed_by(config):
    mesh = placement.make_mesh(config)
    parallel = placement.context_parallel(mesh, config)
    model = learning.make_model(described(config), parallel=parallel)
    return placement.place(config, model, next(batches(config)), mesh)


def run(config, state, update, put=lambda batch: batch):
    """Parameters after three steps, and metrics of each."""
    metrics = []
    for batch in batches(config):
        state, measured = update(state, put(batch))
        metrics.append(measured)
    return jax.device_get((state["params"], metrics))


@pytest.fixture(scope="module")
def beginning():
    """(model, optimiser, what gives the state before the first step), on one device."""
    model, optimiser = learning.make_model(described(SMALL)), learning.optimizer(SMALL)
    example = next(batches(SMALL))
    init = lambda: learning.init_state(model, optimiser, example, SMALL.seed)
    return model, optimiser, jax.jit(init)


@pytest.fixture(scope="module")
def expected(beginning):
    model, optimiser, init = beginning
    return run(SMALL, init(), jax.jit(lambda s, b: learning.update(model, optimiser, s, b)))


@pytest.mark.parametrize("sizes", MESHES, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()))
def test_every_mesh_reaches_the_same_parameters(beginning, expected, sizes):
    placed = placed_by(dataclasses.replace(SMALL, mesh=configs.Mesh(**sizes)))
    places = jax.tree.map(lambda x: x.sharding, placed.target)
    state = jax.device_put(beginning[2](), places)
    actual = run(SMALL, state, placed.update, placed.put)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_mesh_starts_from_the_same_parameters(beginning):
    placed = placed_by(dataclasses.replace(SMALL, mesh=configs.Mesh(data=1, fsdp=2, tensor=2)))
    actual, wanted = (jax.device_get(s["params"]) for s in (placed.init(), beginning[2]()))
    chex.assert_trees_all_close(actual, wanted, rtol=1e-6)


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_accumulation_over_data_alone_reaches_the_same_parameters(expected, parallel):
    config = dataclasses.replace(SMALL, accumulate=2, parallel=parallel)
    placed = placed_by(config)
    actual = run(config, placed.init(), placed.update, placed.put)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_strategy_that_no_mixer_has_is_refused():
    config = dataclasses.replace(SMALL, strategy="rink")
    with pytest.raises(ValueError, match="strategy='rink' must be one of the mixers': all_to_all"):
        placement.context_parallel(placement.make_mesh(config), config)


def test_a_length_that_does_not_divide_is_refused_before_anything_is_compiled():
    task = "mqar(vocab_size=32, length=18, num_pairs=2)"
    config = dataclasses.replace(SMALL, task=task, mesh=configs.Mesh(data=1, context=4))
    with pytest.raises(ValueError, match="multiple of context=4: take 16 or 20"):
        placed_by(config)


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
        placement.make_mesh(dataclasses.replace(SMALL, **changes))
