import chex
import jax
import jax.numpy as jnp

from attnjax.ops import unit_vectors as ops


def test_keeps_directions_and_no_lengths():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5))
    y = ops.unit(x)
    chex.assert_trees_all_close(jnp.linalg.norm(y, axis=-1), jnp.ones((2, 3)), rtol=1e-5)
    chex.assert_trees_all_close(y * jnp.linalg.norm(x, axis=-1, keepdims=True), x, rtol=1e-5)


def test_zero_stays_zero_and_has_a_gradient():
    zero = jnp.zeros((2, 4))
    assert not ops.unit(zero).any()
    assert jnp.isfinite(jax.jacobian(ops.unit)(zero)).all()


def test_keeps_the_dtype():
    assert ops.unit(jnp.ones((1, 4), jnp.bfloat16)).dtype == jnp.bfloat16
