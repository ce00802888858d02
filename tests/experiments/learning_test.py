"""Losses, the optimiser and the update of one step."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import config as configs
from experiments import evaluation, learning

CONFIG = configs.Experiment(
    task="mqar(vocab_size=32, length=16, num_pairs=2)",
    model="lm(features=16, depth=1, num_heads=2)",
    batch_size=4,
    steps=10,
)


@pytest.fixture(scope="module")
def setting():
    _, source = configs.make_task(CONFIG.task, "train")
    model = learning.make_model(learning.model_description(CONFIG, source))
    batch = next(evaluation.padded_batches(source, 4))
    optimiser = learning.optimizer(CONFIG)
    state = jax.jit(lambda: learning.init_state(model, optimiser, batch, 0))()
    return model, optimiser, state, batch


@pytest.fixture(scope="module")
def measure(setting):
    """batch -> (sums, loss with smoothed labels, what optax makes of it, logits)."""
    model, _, state, _ = setting

    @jax.jit
    def measure(batch):
        sums = functools.partial(learning.loss_sums, model, state["params"], batch, state["key"])
        logits = model.apply({"params": state["params"]}, batch["inputs"])
        wanted = optax.smooth_labels(jax.nn.one_hot(batch["targets"], logits.shape[-1]), 0.1)
        smoothed = (batch["weights"] * optax.softmax_cross_entropy(logits, wanted)).sum()
        return sums()[1], sums(label_smoothing=0.1)[0], smoothed, logits

    return lambda batch: jax.device_get(measure(batch))


def by_hand(batch, logits):
    """The loss of each example, over its targets of weight 1."""
    logits = logits.astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = np.zeros(len(logits))
    for b, t in zip(*batch["weights"].nonzero(), strict=True):
        losses[b] -= log_p[b, t, batch["targets"][b, t]]
    return losses


def test_loss_counts_only_weighted_targets(setting, measure):
    batch = setting[-1]
    sums, _, _, logits = measure(batch)
    np.testing.assert_allclose(sums["loss"], by_hand(batch, logits).sum(), rtol=1e-5)
    assert sums["weight"] == 4 * 2


def test_smoothed_labels_are_those_of_optax(setting, measure):
    _, loss, expected, _ = measure(setting[-1])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_step_that_is_not_finite_changes_no_parameter(setting):
    model, optimiser, state, batch = setting
    update = jax.jit(lambda s, b: learning.update(model, optimiser, s, b))
    weights = batch["weights"].copy()
    weights[0] = np.inf
    new, metrics = update(state, batch | {"weights": weights})
    assert not metrics["finite"]
    chex.assert_trees_all_equal(new["params"], state["params"])
    chex.assert_trees_all_equal(new["opt_state"], state["opt_state"])
    warm, metrics = update(update(state, batch)[0], batch)
    assert metrics["finite"]
    both = jax.device_get((warm["params"], state["params"]))
    changed = jax.tree.map(lambda a, b: (a != b).any(), *both)
    assert all(jax.tree.leaves(changed))


def test_optimizer_warms_up_decays_and_clips():
    config = configs.Experiment(steps=100, warmup_steps=10, learning_rate=1.0, weight_decay=0.0)
    optimiser, params = learning.optimizer(config), {"w": jnp.zeros((2, 2))}

    def step(state, gradient):
        updates, state = optimiser.update({"w": gradient}, state, params)
        return state, jnp.abs(updates["w"]).max()

    gradients = np.full((100, 2, 2), 1e6, np.float32)
    sizes = jax.jit(lambda: jax.lax.scan(step, optimiser.init(params), gradients)[1])()
    assert sizes[0] == 0 and np.argmax(sizes) == 10 and sizes[-1] < 0.02


def test_padding_of_an_evaluation_counts_nothing(measure):
    _, source = configs.make_task(CONFIG.task, "test")
    padded, whole = (list(evaluation.padded_batches(source, 4, most=n)) for n in (6, 8))
    found = [measure(batch)[0] for batch in padded]
    first, second = (by_hand(batch, measure(batch)[-1]) for batch in whole)
    assert sum(sums["weight"] for sums in found) == 6 * 2
    np.testing.assert_allclose(
        [s["loss"] for s in found], [first.sum(), second[:2].sum()], rtol=1e-5
    )


def test_a_model_that_does_not_fit_the_task_is_refused():
    for task, model, message in [
        ("mqar", "vit(features=8)", "fits model lm, not vit"),
        ("digits", "lm(features=8)", "fits model vit, not lm"),
        ("icl_regression", "lm(features=8)", "no model fits"),
    ]:
        config = configs.Experiment(task=task, model=model)
        _, source = configs.make_task(task, "train")
        with pytest.raises(ValueError, match=message):
            learning.model_description(config, source)
