"""A forget gate that never falls below a bound, which rises with depth.

    f = gamma + (1 - gamma) sigmoid(z),     gamma = l / L in layer l of L

Source: Qin et al., "Hierarchically Gated Recurrent Neural Network for Sequence Modeling",
arXiv:2311.04823, section 3.2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def log_forget(z: Float[Array, "*B"], bound: float) -> Float[Array, "*B"]:
    """log(f) in float32, finite for every z, with gamma = `bound`.

    Raises ValueError for a bound outside of [0, 1).
    """
    if not 0 <= bound < 1:
        raise ValueError(f"{bound=} must be at least 0 and below 1")
    open_gate = jax.nn.log_sigmoid(z.astype(jnp.float32)) + jnp.log1p(-bound)
    return open_gate if bound == 0 else jnp.logaddexp(open_gate, jnp.log(bound))


def lower_bound(layer: int, num_layers: int) -> float:
    """gamma of a layer; ValueError where `layer` is not one of `num_layers`."""
    if not 0 <= layer < num_layers:
        raise ValueError(f"{layer=} must be at least 0 and below {num_layers=}")
    return layer / num_layers
