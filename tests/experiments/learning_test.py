"""Losses, the optimiser and the update of one step."""

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
    batch = jax.tree.map(jnp.asarray, next(evaluation.padded_batches(source, 4)))
    optimiser = learning.optimizer(CONFIG)
    return model, optimiser, learning.init_state(model, optimiser, batch, 0), batch


def test_loss_counts_only_weighted_targets(setting):
    model, _, state, batch = setting
    _, sums = jax.jit(lambda b: learning.loss_sums(model, state["params"], b, state["key"]))(batch)
    logits = np.asarray(model.apply({"params": state["params"]}, batch["inputs"]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = sum(-log_p[b, t, batch["targets"][b, t]] for b, t in zip(*batch["weights"].nonzero(),
                                                                        strict=True))  # fmt: skip
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)
    assert sums["weight"] == 4 * 2


def test_smoothed_labels_are_those_of_optax(setting):
    model, _, state, batch = setting
    run = lambda b: learning.loss_sums(model, state["params"], b, state["key"], label_smoothing=0.1)
    loss, _ = jax.jit(run)(batch)
    logits = model.apply({"params": state["params"]}, batch["inputs"])
    wanted = optax.smooth_labels(jax.nn.one_hot(batch["targets"], logits.shape[-1]), 0.1)
    expected = (batch["weights"] * optax.softmax_cross_entropy(logits, wanted)).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_step_that_is_not_finite_changes_no_parameter(setting):
    model, optimiser, state, batch = setting
    update = jax.jit(lambda s, b: learning.update(model, optimiser, s, b))
    bad = batch | {"weights": batch["weights"].at[0].set(jnp.inf)}
    new, metrics = update(state, bad)
    assert not metrics["finite"]
    chex.assert_trees_all_equal(new["params"], state["params"])
    chex.assert_trees_all_equal(new["opt_state"], state["opt_state"])
    warm, metrics = update(update(state, batch)[0], batch)
    assert metrics["finite"]
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), warm["params"], state["params"])
    assert all(jax.tree.leaves(changed))


def test_optimizer_warms_up_decays_and_clips():
    config = configs.Experiment(steps=100, warmup_steps=10, learning_rate=1.0, weight_decay=0.0)
    optimiser, params = learning.optimizer(config), {"w": jnp.zeros((2, 2))}
    state, sizes = optimiser.init(params), []
    for _ in range(100):
        updates, state = optimiser.update({"w": jnp.full((2, 2), 1e6)}, state, params)
        sizes.append(float(jnp.abs(updates["w"]).max()))
    assert sizes[0] == 0 and np.argmax(sizes) == 10 and sizes[-1] < 0.02


def test_padding_of_an_evaluation_counts_nothing(setting):
    model, _, state, _ = setting
    _, source = configs.make_task(CONFIG.task, "test")
    for size in (2, 5):
        totals = {}
        for batch in evaluation.padded_batches(source, size, most=6):
            batch = jax.tree.map(jnp.asarray, batch)
            _, sums = learning.loss_sums(model, state["params"], batch, state["key"])
            totals = {k: totals.get(k, 0) + float(x) for k, x in sums.items()}
        assert totals["weight"] == 6 * 2
        if size == 2:
            first = totals
    np.testing.assert_allclose(totals["loss"], first["loss"], rtol=1e-5)


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
