import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.ops import forget_gate as ops


@pytest.mark.parametrize("bound", [0.0, 0.2, 0.9])
def test_is_the_log_of_its_equation(bound):
    z = jnp.linspace(-5, 5, 11)
    f = bound + (1 - bound) * jax.nn.sigmoid(z)
    chex.assert_trees_all_close(jnp.exp(ops.log_forget(z, bound)), f, rtol=1e-6)


def test_is_finite_and_never_below_its_bound():
    z = jnp.array([-1e4, -100.0, 1e4], jnp.bfloat16)
    log_f, slope = jax.vmap(jax.value_and_grad(lambda z: ops.log_forget(z, 0.25)))(z)
    chex.assert_trees_all_close(log_f, jnp.log(jnp.array([0.25, 0.25, 1.0])), atol=1e-6)
    assert log_f.dtype == jnp.float32 and jnp.isfinite(slope).all()
    assert jnp.isfinite(ops.log_forget(z, 0.0)).all()


def test_bound_rises_from_zero_with_depth():
    assert [ops.lower_bound(layer, 4) for layer in range(4)] == [0, 0.25, 0.5, 0.75]


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="layer=4 must be at least 0 and below num_layers=4"):
        ops.lower_bound(4, 4)
    with pytest.raises(ValueError, match=r"bound=1.0 must be at least 0 and below 1"):
        ops.log_forget(jnp.zeros(2), 1.0)
