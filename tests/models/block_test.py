import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.models import block
from tests.models import helpers

NAMES = ["softmax.multi_head_attention", *helpers.named("grid")[:1]]


def small(name, activation="gelu"):
    return block.Block(helpers.text(name), 2, 8, 2, activation, None, None)


@pytest.mark.parametrize("name", NAMES)
def test_norms_come_before_and_are_on_no_path_through(name):
    model, x = small(name), jax.random.normal(helpers.KEY, (2, 8, 8, 16))

    @jax.jit
    def branch(scale):
        params = model.init(helpers.RNGS, x)["params"]
        params["mlp"]["down"] = jax.tree.map(jnp.zeros_like, params["mlp"]["down"])
        return model.apply({"params": params}, scale * x, rngs=dict(noise=helpers.KEY)) - scale * x

    assert branch(1.0).any()
    chex.assert_trees_all_close(branch(8.0), branch(1.0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_mlp(activation):
    mlp, x = block.Mlp(1.5, activation, None), jax.random.normal(helpers.KEY, (3, 4))
    params = mlp.init(helpers.KEY, x)
    up, down = (params["params"][name]["dense"]["kernel"] for name in ("up", "down"))
    assert up.shape == (4, 6) and down.shape == (6, 4)
    if activation == "gelu":
        hidden = jax.nn.gelu(x @ up)
    else:
        gate = x @ params["params"]["gate"]["dense"]["kernel"]
        hidden = gate * jax.nn.sigmoid(gate) * (x @ up)
    chex.assert_trees_all_close(mlp.apply(params, x), hidden @ down, rtol=1e-5, atol=1e-6)
