import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.models import block
from tests.models import helpers

NAMES = ["softmax.multi_head_attention", *helpers.named("grid")[:1]]


def small(name, activation="gelu"):
    return block.Block(helpers.text(name), 2, 8, 2, activation, None, None)


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_norms_come_before_and_are_on_no_path_through(name):
    model, x = small(name), jnp.asarray(normal(2, 8, 8, 16))

    @jax.jit
    def branch(scale):
        params = model.init(helpers.RNGS, x)["params"]
        params["mlp"]["down"] = jax.tree.map(jnp.zeros_like, params["mlp"]["down"])
        return model.apply({"params": params}, scale * x, rngs=dict(noise=helpers.KEY)) - scale * x

    assert branch(1.0).any()
    chex.assert_trees_all_close(branch(8.0), branch(1.0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_mlp(activation):
    mlp, x = block.Mlp(1.5, activation, None), normal(3, 4)
    y, params = jax.device_get(jax.jit(mlp.init_with_output)(helpers.KEY, x))
    kernel = lambda name: params["params"][name]["dense"]["kernel"]
    up, down = kernel("up"), kernel("down")
    assert up.shape == (4, 6) and down.shape == (6, 4)
    if activation == "gelu":
        hidden = x @ up
        hidden = hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3))) / 2
    else:
        gate = x @ kernel("gate")
        hidden = gate / (1 + np.exp(-gate)) * (x @ up)
    chex.assert_trees_all_close(y, hidden @ down, rtol=1e-5, atol=1e-6)
