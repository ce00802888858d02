"""What is particular to uncertainty weighting: its optimum, and that units don't matter."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import sharding
from attnjax.multitask import uncertainty_loss_weighting as ulw


def descend(loss, params, *, steps, rate):
    step = lambda _, p: jax.tree.map(lambda x, g: x - rate * g, p, jax.grad(loss)(p))
    return jax.jit(lambda: jax.lax.fori_loop(0, steps, step, params))()


def test_optimum_is_the_log_of_the_loss():
    losses = jnp.array([0.1, 1.0, 30.0])
    kind = ("regression", "classification", "regression")
    loss = lambda s: ulw.uncertainty_loss_weighting(losses, s, kind=kind)
    s = descend(loss, jnp.zeros(3), steps=200, rate=0.5)
    expected = jnp.log(losses * jnp.array([1.0, 2.0, 1.0]))
    chex.assert_trees_all_close(s, expected, rtol=1e-4, atol=1e-4)
    assert loss(s) < loss(s + 0.1) and loss(s) < loss(s - 0.1)


def test_units_of_one_task_do_not_change_the_other():
    """A target in units 100 times smaller: a loss 10^4 times larger, weighed 10^-4 as much."""
    at_best = lambda scale: ulw.weights(jnp.log(jnp.array([0.5 * scale, 0.3])))
    before, after = at_best(1.0), at_best(100.0**2)
    chex.assert_trees_all_close(after / before, jnp.array([1e-4, 1.0]), rtol=1e-4)


def test_beats_equal_weights_where_scales_differ():
    """One linear model for two noisy targets that want different weights and differ by 100."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, truth = jax.random.normal(keys[0], (64, 8)), jax.random.normal(keys[1], (8,))
    wants = jnp.stack([truth, truth.at[0].add(1.0)], 1)
    targets = x @ wants + jax.random.normal(keys[2], (64, 2))
    unit = jnp.array([1.0, 100.0])
    errors = lambda w: (((x @ w)[:, None] - targets) ** 2).mean(0)  # of both, in like units

    def weighed(p):
        return ulw.uncertainty_loss_weighting(unit**2 * errors(p["w"]), p["s"])

    start = jnp.zeros(8)
    first = dict(w=start, s=jnp.log(unit**2 * errors(start)))
    ours = errors(descend(weighed, first, steps=400, rate=0.2)["w"])
    summed = lambda w: (unit**2 * errors(w)).sum()
    equal = errors(descend(summed, start, steps=400, rate=2e-5))
    assert ours[0] < equal[0] - 0.3 and ours.sum() < equal.sum() - 0.2


def test_module_learns_the_variances():
    losses, module = jnp.array([4.0, 0.2]), ulw.UncertaintyLossWeighting(kind="classification")
    params = module.init(jax.random.key(0), losses)
    assert module.apply(params, losses) == 4.2
    assert list(jax.tree.leaves(sharding.partition_specs(params))) == [jax.P()]
    learned = descend(lambda p: module.apply(p, losses), params, steps=200, rate=0.5)
    s = learned["params"]["log_variance"]["table"]
    chex.assert_trees_all_close(s, jnp.log(2 * losses), rtol=1e-3)


def test_wrong_kinds_raise():
    ones = jnp.ones(3)
    with pytest.raises(ValueError, match="must be 'regression' or 'classification', or 3 of them"):
        ulw.uncertainty_loss_weighting(ones, ones, kind=("regression", "regression"))
