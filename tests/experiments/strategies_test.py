"""A run of 50 steps has the loss of one device at each of them, whatever the strategy."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from attnjax.core import sharding
from experiments import config as configs
from experiments import evaluation, learning, placement

STEPS, BATCHES = 50, 5  # batches come round again, so that the loss falls within so few steps
LM = configs.Experiment(
    task="mqar(vocab_size=32, length=32, num_pairs=4)",
    model="lm(features=16, depth=2, num_heads=4, mlp_ratio=2)",
    mixers=("gqa(num_kv_heads=2, rotary_base=10000.0)", "lightning_attention_2"),
    batch_size=4,
    learning_rate=3e-3,
    steps=STEPS,
    warmup_steps=5,
    mesh=configs.Mesh(data=1, context=4),
)
VIT = dataclasses.replace(
    LM,
    task="digits",
    model="vit(features=16, depth=1, num_heads=2, mlp_ratio=2, patch=1)",
    mixers=("gna(window=(3, 3))",),
)


def prepare(config, mesh):
    """(the training step in its place, batches)."""
    _, source = configs.make_task(config.task, "train")
    batches = evaluation.padded_batches(source, config.batch_size, BATCHES * config.batch_size)
    batches = list(batches)
    parallel = placement.context_parallel(mesh, config)
    model = learning.make_model(learning.model_description(config, source), parallel=parallel)
    return placement.place(config, model, batches[0], mesh), batches


def losses(placed, state, batches):
    """The loss at each step."""
    measured = []
    for step in range(STEPS):
        state, metrics = placed.update(state, placed.put(batches[step % BATCHES]))
        measured.append(metrics["loss"])
    return np.array(jax.device_get(measured))


@functools.cache
def on_one_device(config):
    """(what makes a state before the first step, losses)."""
    placed, batches = prepare(config, sharding.make_mesh(devices=jax.devices()[:1]))
    return placed.init, losses(placed, placed.init(), batches)


@pytest.mark.parametrize(
    ("config", "strategy"),
    [
        # lightning attention has no ring: beside one, it passes its state on
        (LM, "ring(order='zigzag')"),
        (LM, "ring(order='striped')"),
        (LM, "all_to_all"),
        (VIT, "halo"),
    ],
    ids=["zigzag and pass_state", "striped and pass_state", "all_to_all", "halo"],
)
def test_a_run_of_50_steps(config, strategy):
    init, expected = on_one_device(config)
    assert expected[-BATCHES:].mean() < 0.8 * expected[:BATCHES].mean()  # it learns
    config = dataclasses.replace(config, strategy=strategy)
    placed, batches = prepare(config, placement.make_mesh(config))
    places = jax.tree.map(lambda x: x.sharding, placed.target)
    actual = losses(placed, jax.device_put(init(), places), batches)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
