import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.ops import auxiliary_loss


def test_adds_the_gradient_of_the_loss_and_changes_no_value():
    def model(x, w):
        return auxiliary_loss.attach(3.0 * x, (w**2).sum())

    x, w = jnp.arange(4.0), jnp.array([1.0, -2.0])
    run = jax.jit(jax.value_and_grad(lambda x, w: (model(x, w) ** 2).sum(), (0, 1)))
    value, grads = run(x, w)
    chex.assert_trees_all_close((value, grads), ((9 * x**2).sum(), (18 * x, 2 * w)))
    scaled = jax.grad(lambda w: 100 * model(x, w).sum())(w)
    chex.assert_trees_all_close(scaled, 2 * w)  # not 100 times as much


def test_costs_nothing_without_a_gradient():
    def model(x):
        return auxiliary_loss.attach(x, (x @ x.T).sum())

    x = jnp.ones((3, 3))
    loss = lambda x: model(x).sum()
    text = lambda fn: jax.jit(fn).lower(x).compile().as_text()
    assert "dot(" in text(jax.grad(loss)) and "dot(" not in text(loss)


def test_has_no_forward_mode():
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: auxiliary_loss.attach(x, x), (1.0,), (1.0,))
