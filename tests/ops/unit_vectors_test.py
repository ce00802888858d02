import chex
import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops import unit_vectors as ops


def test_keeps_directions_and_no_lengths():
    x = np.random.default_rng(0).standard_normal((2, 3, 5), "f4")
    y = np.asarray(jax.jit(ops.unit)(x))
    chex.assert_trees_all_close(np.linalg.norm(y, axis=-1), np.ones((2, 3)), rtol=1e-5)
    chex.assert_trees_all_close(y * np.linalg.norm(x, axis=-1, keepdims=True), x, rtol=1e-5)


def test_zero_stays_zero_and_has_a_gradient():
    zero = jnp.zeros((2, 4))
    unit, slopes = jax.jit(lambda x: (ops.unit(x), jax.jacobian(ops.unit)(x)))(zero)
    assert not np.any(unit) and np.isfinite(slopes).all()


def test_keeps_the_dtype():
    shape = jax.ShapeDtypeStruct((1, 4), jnp.bfloat16)
    assert jax.eval_shape(ops.unit, shape).dtype == jnp.bfloat16
