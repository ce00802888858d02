"""A loss for parameters that no other loss reaches, as those of a choice, which has no gradient.

`attach` puts it where the parameters are used, so that every gradient taken through that place
trains them, and a model needs no way to bring the loss out.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def attach(x: Float[Array, "*B"], loss: Float[Array, ""]) -> Float[Array, "*B"]:
    """x. Backward, the gradient of `loss` is added to that of whatever is minimised.

    It is added once, whatever the cotangent of x. Without a gradient, the loss is not computed
    under jit. Forward mode raises TypeError.
    """
    return x


def _forward(x, loss):
    return x, jnp.ones_like(loss)


def _backward(one, cotangent):
    return cotangent, one


attach.defvjp(_forward, _backward)
