"""What the weights of a selective scan begin as."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import selection

KEY = jax.random.key(0)


def test_begins_as_mamba_does():
    module = selection.Selection(count=4, features=33, state=5)
    (select, widen, bias, log_rate, skip), _ = jax.jit(module.init_with_output)(KEY)
    assert [x.shape for x in (select, widen, bias)] == [(4, 33, 13), (4, 3, 33), (4, 33)]
    step = jax.nn.softplus(bias)
    assert step.min() >= 0.99e-3 and step.max() <= 0.101 and 0.005 < jnp.median(step) < 0.02
    rates = jnp.broadcast_to(jnp.arange(1.0, 6.0), (4, 33, 5))
    chex.assert_trees_all_close(jnp.exp(log_rate), rates, rtol=1e-6)
    chex.assert_trees_all_equal(skip, jnp.ones((4, 33)))
    assert abs(widen).max() <= 3**-0.5 and 0.9 < 33 * select.var() < 1.1


def test_options_are_checked_and_used():
    shapes = lambda **options: jax.eval_shape(
        lambda: selection.Selection(count=1, features=8, **options).init_with_output(KEY)[0]
    )
    assert shapes(state=1, rank=6)[0].shape == (1, 8, 8)
    with pytest.raises(ValueError, match="state=0 and rank=1 must be at least 1"):
        shapes(state=0)
